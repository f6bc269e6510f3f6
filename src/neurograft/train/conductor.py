"""Makes a training loop obey a schedule: who is awake, how fast, and what becomes of moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from neurograft.anatomy.depth import Depths, depths
from neurograft.core.choose import Chosen, choose, option_names
from neurograft.core.compact.mount import Mount
from neurograft.core.context import Phase
from neurograft.core.errors import RequestError, near, one_of
from neurograft.core.selection import Selection
from neurograft.train.moved import Witness
from neurograft.train.optimizers import carry

VALUES = ("keep", "rewind")


class Conductor:
    """Asks the schedule before every step and makes the tensors obey.

    Args:
        schedule: a choice of `schedules`, or None: everything is awake all the time.
        mount: what is trained.
        freeze: let sleeping tensors ask for no gradient, which spares the layers below; not under DDP, whose
            reducer waits for every tensor.
        reselect: (model, step) -> Selection, for schedules that turn to other units.
        witness: told of every turn.
        seed: for schedules that draw, unless their options name one. Such schedules are pure in (seed, step), so
            that every process wakes the same tensors.
    """

    def __init__(
        self,
        schedule: Any,
        mount: Mount,
        *,
        freeze: bool = True,
        reselect: Callable[[nn.Module, int], Selection] | None = None,
        witness: Witness | None = None,
        seed: int = 0,
    ) -> None:
        self.schedule: Chosen | None = None if schedule is None else choose("schedules", schedule)
        self.given: dict[str, Any] = {}
        if self.schedule is not None:
            takes = option_names(self.schedule.function)
            if "seed" in takes and "seed" not in self.schedule.options:
                self.schedule = replace(self.schedule, options={**self.schedule.options, "seed": seed})
            if "depth" in takes:
                self.given["depth"] = _depths(mount)
        self.mount, self.freeze, self.reselect, self.witness = mount, freeze, reselect, witness
        self.phase = Phase()
        self.woken: set[str] | None = None
        self.rates: list[float] = []

    def begin(self, step: int, optimizer: Any, scheduler: Any = None) -> Phase:
        """Take over the phase of a step, before its forward pass.

        A phase is asked for twice where it selects anew: the second answer is about the new tensors.

        Raises:
            RequestError: the schedule names tensors that do not exist, or puts all of them to sleep.
        """
        if self.schedule is None:
            return self.phase
        phase = self._asked(step)
        if phase.reselect:
            self._turn(step, optimizer, scheduler, phase)
            phase = self._asked(step)
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
        self._leave(step, awake, phase)
        for name, parameter in parameters.items():
            if self.freeze:
                parameter.requires_grad_(name in awake)
            if phase.moments == "drop" and name not in awake:
                optimizer.state.pop(parameter, None)
        self.phase = phase
        return phase

    def _leave(self, step: int, awake: set[str], phase: Phase) -> None:
        """Rewind what has just fallen asleep, if the schedule says so."""
        before = self.woken
        if before is None and step:  # the first step after a resume: schedules are pure, so the last phase is known
            said = self._asked(step - 1).awake
            before = set(self.mount.named_parameters()) if said is None else set(said)
        self.woken = set(awake)
        left = sorted((before or set()) - awake)
        if one_of(phase.values, VALUES, what="policy for values") == "keep" or not left or phase.reselect:
            return  # a turn to other units has rewound those it left
        assert self.witness is not None
        self.witness.rewind(left)
        self.mount.write()

    def _asked(self, step: int) -> Phase:
        assert self.schedule is not None
        phase: Phase = self.schedule(step, list(self.mount.named_parameters()), **self.given)
        return phase

    def _turn(self, step: int, optimizer: Any, scheduler: Any, phase: Phase) -> None:
        turn = getattr(self.mount, "reselect", None)
        if not self.freeze:
            raise RequestError(
                f"a schedule that selects anew at step {step}, of a wrapped model",
                expected="the plain model: the wrapper is built over the tensors it began with",
                do="train with ng.tune or GraftTrainerMixin, in several processes too, or take a schedule that is pure "
                "in (seed, step), such as 'sampled'",
            )
        if self.reselect is None or turn is None:
            raise RequestError(
                f"a schedule that selects anew at step {step}",
                expected="a locator to ask, and adapter='slice' whose units are not tied",
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


def _depths(mount: Mount) -> Depths:
    here = {n for n, _ in mount.model.named_parameters(remove_duplicate=False)}
    # Adapter layers in the place of the model's own hide its anatomy; the others leave the modules as they are.
    ended = mount.rest() if set(mount.found.by_name) - here else lambda: None
    try:
        return depths(mount.model)
    finally:
        ended()
