"""What happens around a Trainer's steps, and how to ask the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from neurograft.core.compact.forward import ForwardOnly
from neurograft.core.compact.mount import Mount
from neurograft.core.errors import RequestError


class StepEvents(TrainerCallback):
    """Keeps a `GraftTrainerMixin`'s conductor, witness and window up to date.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take input gradients off again where checkpointing does not need them.

        transformers turns them on with activation checkpointing; they force gradients through every layer below
        the lowest trained one. Non-reentrant checkpointing works without.
        """
        reentrant = (args.activation_checkpointing_kwargs or {}).get("use_reentrant", False)
        model = self.trainer.model
        if args.activation_checkpointing and not reentrant and hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the schedule."""
        self.trainer.window_loss, self.trainer.micro = None, 0
        self.trainer.conductor.begin(state.global_step, kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note who got a gradient; set the step's learning rates."""
        self.trainer.witness.gradients(self.trainer.conductor.phase.awake, self.trainer.reached)
        self.trainer.conductor.before_step(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the scheduler's learning rates back."""
        self.trainer.conductor.after_step(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the window's loss."""
        self.trainer.witness.losses.append(float(self.trainer.window_loss))


def driven(mount: Mount, optimizer: Any) -> ForwardOnly | None:
    """Tell a mount whose optimizer needs no gradients, and return it; None for any other optimizer.

    Raises:
        RequestError: one that asks for the loss again and again within a step, which no loop here does.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise RequestError(
            "LBFGS, whose step asks for the loss again and again",
            expected="an optimizer that steps once on a window's gradient",
            do="choose another, or call its step(closure) in a loop of your own over live.parameters()",
        )
    mount.driver = optimizer if isinstance(optimizer, ForwardOnly) else None
    return mount.driver


def probed(mount: Mount, loss: Callable[[], Any]) -> tuple[float, set[str]]:
    """Look at a batch from every side that a mount's gradient-free optimizer asks for.

    Args:
        mount: its driver is set.
        loss: the batch's share of the window's loss, as the model stands.

    Returns:
        The mean loss, and the names of the tensors that were used.
    """
    assert mount.driver is not None
    reached: set[str] = set()
    modes = [(m, m.training) for m in mount.model.modules()]
    mount.model.eval()  # dropout would be a second noise

    def ask(terms: Any) -> float:
        with mount.shifted(terms) as seen:
            found = float(loss())
        reached.update(seen)
        return found

    try:
        with torch.no_grad():
            return mount.driver.probe(ask), reached
    finally:
        for module, mode in modes:
            module.training = mode


def differentiable(loss: Any) -> Any:
    """Return a loss that has a gradient.

    Raises:
        RequestError: it has none.
    """
    if not loss.requires_grad:
        raise RequestError(
            "an objective without a gradient, as a metric has none",
            expected="a loss that depends on the trained tensors through torch operations",
            do="optimizer='mezo', which asks for numbers only",
        )
    return loss


def reference_of(mount: Mount) -> Callable[[Callable[[], Any]], Any]:
    """Return what runs something on the base: the change taken out, no dropout, no gradients.

    The base is the trained model itself, so it costs no memory.
    """

    def run(ask: Callable[[], Any]) -> Any:
        modes = [(m, m.training) for m in mount.model.modules()]
        mount.model.eval()
        ended = mount.rest()
        try:
            with torch.no_grad():
                return ask()
        finally:
            ended()
            for module, mode in modes:
                module.training = mode

    return run
