"""What methods are given: a locator or an edit sees a Context, an objective a Step, a loop obeys a Phase.

Whoever writes a method takes these words from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.batches import IGNORE, POSITIONS, Batch, device_of, shifts, token_mask, unlabelled
from neurograft.core.errors import RequestError
from neurograft.core.phase import Phase
from neurograft.core.prompts.requests import Request
from neurograft.core.running import run
from neurograft.core.seeds import generator
from neurograft.core.step import Step, Trained
from neurograft.core.units import Site

__all__ = [
    "IGNORE",
    "POSITIONS",
    "Batch",
    "Context",
    "Phase",
    "Request",
    "Said",
    "Step",
    "Trained",
    "device_of",
    "shifts",
    "token_mask",
    "unlabelled",
]


@dataclass(frozen=True)
class Said:
    """A target that reads what a model says and no loss of its own, so that none needs to be computed.

    Args:
        of: (outputs, batch) -> scalar.

    Example:
        >>> Said(lambda outputs, batch: outputs.sum())(torch.ones(2), {})
        tensor(2.)
    """

    of: Callable[[Any, Batch], Tensor]

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        """Return the scalar."""
        return self.of(outputs, batch)


@dataclass
class Context:
    """What a locator or an edit may see.

    Args:
        model: the model, in evaluation mode, on its device; to be left as found.
        sites: the units in question.
        batches: model inputs, tensors on the model's device.
        contrast: a second set of batches, for methods that compare.
        groups: several sets of batches by name (languages, tasks), for methods that compare more than two.
        loss: (model, batch) -> scalar loss, the bound objective.
        asked: the objective itself, for methods that tell it the number of their step; `loss` is asked if None.
        target: (outputs, batch) -> scalar, for attributions to something else than the loss; a `Said` if it reads none.
        positions: which tokens count: one of `POSITIONS`, or a callable batch -> bool [B, T].
        processor: tokenizer or processor, if there is one.
        requests: edit requests.
        against: a second model or a graft to compare with.
        rehearse: runs a short training on a selection and returns the graft, for methods that must train.
        seed: root of every named generator.
    """

    model: nn.Module
    sites: Mapping[str, Site]
    batches: Sequence[Batch] = ()
    contrast: Sequence[Batch] = ()
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    target: Callable[[Any, Batch], Tensor] | None = None
    positions: str | Callable[[Batch], Tensor] = "all"
    processor: Any = None
    requests: Sequence[Request] = ()
    against: Any = None
    rehearse: Callable[..., Any] | None = None
    seed: int = 0
    groups: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    asked: Callable[[Step], Tensor] | None = None

    def generator(self, *names: object) -> torch.Generator:
        """Return the generator of that name."""
        return generator(self.seed, *names)

    def by_group(self) -> dict[str, Sequence[Batch]]:
        """Return the groups by name; batches and contrast are the groups "positive" and "negative".

        Raises:
            RequestError: fewer than two groups, or one without data.
        """
        found = dict(self.groups)
        if not found and self.contrast:
            found = {"positive": self.batches, "negative": self.contrast}
        empty = [name for name, batches in found.items() if not batches]
        if len(found) < 2 or empty:
            raise RequestError(
                f"no data for the group {empty[0]!r}" if empty else f"data of {max(1, len(found))} group",
                expected="at least two groups to compare",
                do="give rows with a `group` column, or with `positive` and `negative`",
            )
        return found

    def mask(self, batch: Batch) -> Tensor | None:
        """Return which tokens of a batch count, bool [B, T], or None if it has no tokens."""
        return token_mask(batch, self.positions)

    def scalar(self, batch: Batch, *, step: int = 0) -> Tensor:
        """Run the model with gradients and return what is attributed: the target if there is one, else the loss.

        The loss of a batch is the mean of its rows' own losses (`Step.apart`), so that scores do not depend on how
        examples are batched. `step` is for losses that draw: one number, one draw.
        """
        if self.target is not None:
            given = run(self.model, batch) if isinstance(self.target, Said) else self.model(**batch)
            return self.target(given, batch)
        if self.asked is not None:
            return self.asked(Step(self.model, batch, step=step, apart=True))
        if self.loss is None:
            raise RequestError(
                "no objective and no target",
                expected="one of them",
                do="pass objective='auto' with labelled data, or target=callable",
            )
        return self.loss(self.model, batch)
