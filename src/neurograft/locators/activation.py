"""How strongly a unit is active."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.selection import Scores
from neurograft.core.taps.reducers import Extremes, Moments, Rate, Reducer, Sample, Sums
from neurograft.core.taps.stream import observe
from neurograft.locators._common import need_batches, scored
from neurograft.locators._parts import norms

STATISTICS = ("mean_abs", "mean", "rms", "std", "rate", "max", "quantile")


@method(needs={"batches", "taps"}, takes={"positions"}, claims={"finite", "length", "permutes", "planted"})
def activation(
    context: Context,
    *,
    statistic: str = "mean_abs",
    pool: str = "token",
    above: float = 0.0,
    q: float = 0.95,
    size: int = 1024,
    written: bool = False,
) -> Scores:
    """Score each unit by a statistic of its activation over the counted tokens.

    Units of several features (heads) are read as the norm of their features.

    Args:
        context: model, sites with taps, batches, positions.
        statistic: "mean_abs", "mean", "rms", "std", "rate" (share above `above`), "max", or "quantile" (`q`).
        pool: what counts once: a "token", or the "mean" or "max" of each example.
        above: the bar of "rate".
        q: which quantile.
        size: tokens kept for it; exact up to so many.
        written: multiply by the norm of what a unit writes its output with, so that the score is the size of its
            contribution.

    Raises:
        RequestError: no data, units without a tap, or `written` for units that write with no weights.
    """
    one_of(statistic, STATISTICS, what="statistic")
    need_batches(context)

    def make(n: int) -> dict[str, Reducer]:
        if statistic in ("mean_abs", "rms"):
            return {"": Sums(n)}
        if statistic in ("mean", "std"):
            return {"": Moments(n)}
        if statistic == "rate":
            return {"": Rate(n, above=above)}
        return {"": Extremes(n) if statistic == "max" else Sample(n, size=size, seed=context.seed)}

    found = observe(context.model, context.sites, context.batches, make, mask=context.positions, pool=pool)
    values = {name: _value(statistic, reducers, q) for name, reducers in found.items()}
    if written:
        values = {name: v * _written(context, name) for name, v in values.items()}
    tokens = max(r[""].count for r in found.values())
    return scored(context, values, {"tokens": tokens})


def _value(statistic: str, reducers: Mapping[str, Reducer], q: float) -> Tensor:
    found = reducers[""]
    count = max(1, found.count)
    if isinstance(found, Sums):
        return found.absolute / count if statistic == "mean_abs" else (found.squared / count).sqrt()
    if isinstance(found, Moments):
        return found.mean if statistic == "mean" else found.variance.sqrt()
    if isinstance(found, Rate):
        return found.rate
    if isinstance(found, Extremes):
        return found.high
    assert isinstance(found, Sample)
    return found.quantile(q)


def _written(context: Context, name: str) -> Tensor:
    site = context.sites[name]
    if not site.writes:
        raise RequestError(
            f"written=True at {name!r}, whose units write with no weights",
            expected="units with a write part, such as neurons and heads",
            do="leave written out",
        )
    return norms(site, context.model, lambda i: i in site.writes)
