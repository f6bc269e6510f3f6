"""Which units tell two sets of examples apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.context import Batch, Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.selection import Scores
from neurograft.core.taps.reducers import Moments, Rate, Reducer
from neurograft.core.taps.stream import observe
from neurograft.locators._common import need_batches, scored

STATISTICS = ("mean", "rate")


@method(needs={"batches", "taps"}, takes={"against", "positions"}, claims={"finite", "length", "permutes", "planted"})
def contrast(
    context: Context,
    *,
    statistic: str = "mean",
    pool: str = "mean",
    above: float = 0.0,
    signed: bool = True,
    standardize: bool = True,
) -> Scores:
    """Score each unit by its difference between two sets, in standard deviations: (m1 - m0) / sqrt((v1 + v0) / 2).

    The sets are `context.batches` and `context.contrast`; or, if a second model or a graft is given as
    `against` and there is no contrast, the same batches in the second model and in this one.

    Args:
        context: model, sites with taps, batches, and contrast or against; positions.
        statistic: of the activation: its "mean", or the "rate" of tokens above `above`, whose variance is
            p (1 - p).
        pool: what counts once: a "token", or the "mean" or "max" of each example.
        above: the bar of "rate".
        signed: keep the sign: high scores belong to the first set.
        standardize: False leaves the difference as it is.

    Raises:
        RequestError: no data on one side, or units without a tap.
    """
    one_of(statistic, STATISTICS, what="statistic")
    need_batches(context)

    def make(n: int) -> dict[str, Reducer]:
        return {"": Moments(n) if statistic == "mean" else Rate(n, above=above)}

    def side(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
        return dict(observe(model, context.sites, batches, make, mask=context.positions, pool=pool))

    if context.contrast:
        first, second = side(context.model, context.batches), side(context.model, context.contrast)
    elif context.against is not None:
        with _other(context) as other:
            first = side(other, context.batches)
        second = side(context.model, context.batches)
    else:
        raise RequestError(
            "one set of examples",
            expected="two sets, or a second model",
            do="give rows with `positive` and `negative`, or against=",
        )
    return scored(context, {n: _difference(first[n][""], second[n][""], signed, standardize) for n in context.sites})


def _difference(a: Reducer, b: Reducer, signed: bool, standardize: bool) -> Tensor:
    (mean_a, var_a), (mean_b, var_b) = _mean_and_variance(a), _mean_and_variance(b)
    found = mean_a - mean_b
    if standardize:
        spread = ((var_a + var_b) / 2).sqrt()
        # A unit that never varies tells nothing apart unless its two constants differ; then any spread will do.
        floor = 1e-6 * torch.maximum(mean_a.abs(), mean_b.abs()) + 1e-12
        found = found / torch.maximum(spread, floor)
    return found if signed else found.abs()


def _mean_and_variance(found: Reducer) -> tuple[Tensor, Tensor]:
    if isinstance(found, Moments):
        return found.mean, found.variance
    assert isinstance(found, Rate)
    return found.rate, found.rate * (1 - found.rate)


def _other(context: Context) -> AbstractContextManager[nn.Module]:
    other = context.against
    return other.on(context.model) if isinstance(other, Graft) else nullcontext(other)
