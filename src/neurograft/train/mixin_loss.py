"""The half of `GraftTrainerMixin` that computes losses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neurograft.core.compact.mount import Mount
from neurograft.core.context import Step
from neurograft.core.prompts.passing import examples
from neurograft.train.asked import Asked
from neurograft.train.conductor import Conductor
from neurograft.train.moved import Witness
from neurograft.train.steps import differentiable, probed, reference_of
from neurograft.train.together import average
from neurograft.train.trl import FusedStep, is_trl


class Losses:
    """Asks the objective in the place of the Trainer's own loss, and adds up what an accumulation window gives."""

    mount: Mount
    asked: Asked | None
    conductor: Conductor
    witness: Witness
    window_loss: Tensor | None = None
    micro: int = 0
    probing: bool = False
    together: bool = False
    reached: frozenset[str] = frozenset()
    rows: Tensor | int | None = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's share of the accumulation window, and the outputs if asked for."""
        trainer: Any = self
        if self.asked is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        training = bool(trainer.model.training) or self.probing
        world = trainer.args.world_size if trainer.args.average_tokens_across_devices else 1
        step, outputs = self._step(model, inputs, return_outputs, num_items_in_batch)
        windows = trainer.current_gradient_accumulation_steps if training else 1
        draw = trainer.state.global_step * trainer.args.gradient_accumulation_steps + self.micro
        loss = self.asked.loss(step, windows=windows, world=world, draw=draw, anchored=training)
        self.micro += training and not self.probing
        if training and not self.probing:
            differentiable(loss)
        if return_outputs and outputs is None:
            outputs = step.__dict__.get("outputs") or step.__dict__.get("predictions")
            if outputs is None:  # a callable keeps what it computes to itself
                outputs = {} if trainer.compute_metrics is None else step.predictions
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of an accumulation window as the Trainer does, and note how many examples they hold."""
        trainer: Any = self
        found = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.rows = sum(examples(batch) for batch in found[0] if isinstance(batch, Mapping))
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            counted = torch.tensor([self.rows], device=trainer.args.device)
            self.rows = trainer.accelerator.gather(counted).sum()
        return found

    def _step(self, model: Any, inputs: dict[str, Any], return_outputs: bool, items: Any) -> tuple[Step, Any]:
        trainer: Any = self
        more = (trainer.state.global_step, trainer.state.max_steps, items, reference_of(self.mount))
        if not is_trl(self):
            batch, extra = _columns(trainer.model, inputs)
            # In evaluation a batch stands for itself.
            rows = self.rows if trainer.model.training or self.probing else None
            return Step(trainer.model, batch, *more, extra, model, self.mount.held, rows=rows), None
        held: dict[str, Any] = {}

        def once(**kwargs: Any) -> Any:
            found = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                held["fused"] = found
            return found

        # TRL's own method runs the forward pass and keeps its metrics; its loss is not used.
        own = super().compute_loss(once, inputs, return_outputs, items)  # type: ignore[misc]
        step = FusedStep(trainer.model, inputs, *more, trained=self.mount.held, fused=held["fused"])
        return step, own[1] if return_outputs else None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do the Trainer's step and check its loss.

        Raises:
            RunError: the loss is not finite.
        """
        trainer: Any = self
        if self.mount.driver is not None:
            loss = self._forward_step(*args, **kwargs)
        else:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
            if self.together and trainer.accelerator.sync_gradients:
                average(self.mount.parameters())
        self.witness.loss(loss, step=trainer.state.global_step + 1)
        self.window_loss = loss if self.window_loss is None else self.window_loss + loss
        return loss

    def _forward_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Look at the batch from every side the gradient-free optimizer asks for; nothing is differentiated."""
        trainer: Any = self
        inputs = trainer._prepare_inputs(inputs)

        def share() -> Tensor:
            with trainer.compute_loss_context_manager():
                found: Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                return found

        self.probing = True
        try:
            mean, reached = probed(self.mount, share)
        finally:
            self.probing = False
        self.micro, self.reached = self.micro + 1, self.reached | reached
        return torch.tensor(mean, device=trainer.args.device)

    def _clip_grad_norm(self, model: Any) -> Any:
        self._settle()
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _settle(self) -> None:
        for name, parameter in self.mount.named_parameters().items():
            if self.conductor.phase.awake is not None and name not in self.conductor.phase.awake:
                parameter.grad = None


def _columns(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a batch into model inputs and other columns; a model that takes anything gets everything."""
    parameters = inspect.signature(model.forward).parameters
    named = {n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if not named:
        return dict(inputs), {}
    return {k: v for k, v in inputs.items() if k in named}, {k: v for k, v in inputs.items() if k not in named}
