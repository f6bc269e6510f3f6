"""Makes a training loop obey a schedule: who is awake, how fast, and what becomes of moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from neurograft.core.choose import Chosen, choose
from neurograft.core.context import Phase
from neurograft.core.errors import RequestError, near
from neurograft.core.mount import Mount
from neurograft.core.selection import Selection
from neurograft.train.moved import Witness
from neurograft.train.optimizers import carry


class Conductor:
    """Asks the schedule before every step and makes the tensors obey.

    Args:
        schedule: a choice of `schedules`, or None: everything is awake all the time.
        mount: what is trained.
        freeze: let sleeping tensors ask for no gradient, which spares the layers below; not under DDP, whose
            reducer waits for every tensor.
        reselect: (model, step) -> Selection, for schedules that turn to other units.
        witness: told of every turn.
    """

    def __init__(
        self,
        schedule: Any,
        mount: Mount,
        *,
        freeze: bool = True,
        reselect: Callable[[nn.Module, int], Selection] | None = None,
        witness: Witness | None = None,
    ) -> None:
        self.schedule: Chosen | None = None if schedule is None else choose("schedules", schedule)
        self.mount, self.freeze, self.reselect, self.witness = mount, freeze, reselect, witness
        self.phase = Phase()
        self.rates: list[float] = []

    def begin(self, step: int, optimizer: Any, scheduler: Any = None) -> Phase:
        """Take over the phase of a step, before its forward pass.

        A phase is asked for twice where it selects anew: the second answer is about the new tensors.

        Raises:
            RequestError: the schedule names tensors that do not exist, or puts all of them to sleep.
        """
        if self.schedule is None:
            return self.phase
        phase: Phase = self.schedule(step, list(self.mount.named_parameters()))
        if phase.reselect:
            self._turn(step, optimizer, scheduler, phase)
            phase = self.schedule(step, list(self.mount.named_parameters()))
        parameters = self.mount.named_parameters()
        awake = set(parameters) if phase.awake is None else set(phase.awake)
        odd = sorted((awake | set(phase.lr)) - set(parameters))
        if odd or not awake:
            what = f"with {odd[0]!r} in it" if odd else "in which nothing moves"
            raise RequestError(
                f"the schedule's phase at step {step}, {what}",
                expected="names of trainable tensors, at least one of them awake",
                do=near(odd[0], parameters) if odd else "keep one tensor awake",
            )
        for name, parameter in parameters.items():
            if self.freeze:
                parameter.requires_grad_(name in awake)
            if phase.moments == "drop" and name not in awake:
                optimizer.state.pop(parameter, None)
        self.phase = phase
        return phase

    def _turn(self, step: int, optimizer: Any, scheduler: Any, phase: Phase) -> None:
        turn = getattr(self.mount, "reselect", None)
        if self.reselect is None or turn is None or not self.freeze:
            raise RequestError(
                f"a schedule that selects anew at step {step}",
                expected="a locator to ask, adapter='slice' in place, and one process",
                do="pass reselect=(model, step) -> Selection",
            )
        if self.witness is not None and self.witness.awake:  # none yet at the start and after a resume
            self.witness.check()
        ask = self.reselect
        regions = self.mount.regions()  # type: ignore[attr-defined]
        old = turn(lambda: ask(self.mount.model, step), rewind=phase.values == "rewind")
        carry(optimizer, scheduler, self.mount, old, regions, keep=phase.moments == "keep")
        if self.witness is not None:
            self.witness.restart()

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
