"""Measures that are means over labelled places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neurograft.audits._compare import Paired
from neurograft.audits._measures import measure
from neurograft.audits._paired import Runs

Reader = Callable[[Paired], Tensor]


@dataclass(frozen=True)
class Average:
    """A measure that is a mean over labelled places.

    Args:
        unit: of the number.
        better: "higher", "lower" or "zero".
        moved: the change at each place; the difference of `new` and `base` if None.
        base: the number for the base at each place, if it has one.
        new: the number under the change.
    """

    unit: str
    better: str
    moved: Reader | None = None
    base: Reader | None = None
    new: Reader | None = None

    def at_places(self, paired: Paired) -> Tensor:
        """Return the change at each place, float64 [N]."""
        if self.moved is not None:
            return self.moved(paired).double()
        assert self.base is not None
        assert self.new is not None
        return self.new(paired).double() - self.base(paired).double()

    def table(self, paired: Paired) -> Tensor:
        """Return sums by item whose ratio is the mean change over places, float64 [n, 2]."""
        return paired.per_item(self.at_places(paired))


def averages(runs: Runs, wanted: Mapping[str, Average], **options: Any) -> dict[str, Any]:
    """Return the measures of several averages, by name; options as for `measure`."""
    return {
        name: measure(
            runs,
            one.table,
            unit=one.unit,
            better=one.better,
            base=_mean(one.base) if one.base else None,
            new=_mean(one.new) if one.new else None,
            name=name,
            **options,
        )
        for name, one in wanted.items()
    }


def _mean(read: Reader) -> Callable[[Paired], float]:
    """Return the mean of a value over places, as a function of a run."""
    return lambda paired: float(read(paired).double().mean())
