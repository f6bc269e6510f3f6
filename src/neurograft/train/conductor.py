"""Makes a training loop obey a schedule: who is awake, how fast, and what becomes of moments."""

from __future__ import annotations

from typing import Any

import torch

from neurograft.core.choose import Chosen, choose
from neurograft.core.context import Phase
from neurograft.core.errors import RequestError, near
from neurograft.core.mount import Mount


class Conductor:
    """Asks the schedule before every step and makes the tensors obey.

    Args:
        schedule: a choice of `schedules`, or None: everything is awake all the time.
        mount: what is trained.
        freeze: let sleeping tensors ask for no gradient, which spares the layers below; not under DDP, whose
            reducer waits for every tensor.
    """

    def __init__(self, schedule: Any, mount: Mount, *, freeze: bool = True) -> None:
        self.schedule: Chosen | None = None if schedule is None else choose("schedules", schedule)
        self.mount, self.freeze = mount, freeze
        self.phase = Phase()
        self.rates: list[float] = []

    def begin(self, step: int, optimizer: Any) -> Phase:
        """Take over the phase of a step, before its forward pass.

        Raises:
            RequestError: the schedule names tensors that do not exist, or puts all of them to sleep.
        """
        if self.schedule is None:
            return self.phase
        parameters = self.mount.named_parameters()
        phase: Phase = self.schedule(step, list(parameters))
        awake = set(parameters) if phase.awake is None else set(phase.awake)
        odd = sorted((awake | set(phase.lr)) - set(parameters))
        if odd or not awake:
            raise RequestError(
                f"the schedule's phase at step {step}, "
                + (f"with {odd[0]!r} in it" if odd else "in which nothing moves"),
                expected="names of trainable tensors, at least one of them awake",
                do=near(odd[0], parameters) if odd else "keep one tensor awake",
            )
        if phase.reselect:
            raise RequestError(
                f"a schedule that selects anew at step {step}",
                expected="a loop that has a locator to ask",
                do="train with neurograft.train.loop.fit(..., reselect=...)",
            )
        for name, parameter in parameters.items():
            if self.freeze:
                parameter.requires_grad_(name in awake)
            if phase.moments == "drop" and name not in awake:
                optimizer.state.pop(parameter, None)
        self.phase = phase
        return phase

    def before_step(self, optimizer: Any) -> None:
        """Take sleeping gradients away and set the step's learning rates."""
        if self.schedule is None:
            return
        for name, parameter in self.mount.named_parameters().items():
            if self.phase.awake is not None and name not in self.phase.awake:
                parameter.grad = None
        self.rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.phase.lr.get(group.get("name", ""), 1.0)

    def after_step(self, optimizer: Any) -> None:
        """Put the learning rates back for the scheduler."""
        for group, rate in zip(optimizer.param_groups, self.rates):
            group["lr"] = rate
        self.rates = []

    def end(self) -> None:
        """Wake every tensor."""
        if self.schedule is not None:
            for parameter in self.mount.parameters():
                parameter.requires_grad_(True)


def decaying(model: torch.nn.Module, mount: Mount) -> list[str]:
    """Return the names of a mount's tensors that weight decay acts on: not norms, not biases."""
    plain = []
    for name in mount.named_parameters():
        lower = name.lower()
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner) if owner in dict(model.named_modules()) else None
        if "bias" in lower or "norm" in lower or isinstance(module, torch.nn.LayerNorm):
            continue
        plain.append(name)
    return plain
