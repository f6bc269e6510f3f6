"""Whether the model still knows how sure it may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._averages import Average, averages
from neurograft.audits._compare import Paired
from neurograft.audits._measures import measure, numbers, overview
from neurograft.audits._paired import Runs, runs
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError


@method(needs={"batches", "labels"}, claims={"empty_is_zero", "noise_floor"})
def calibration(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    bins: int = 15,
    nulls: int = 8,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    measured: Runs | None = None,
) -> dict[str, Any]:
    """Measure expected calibration error and Brier score of base and changed model.

    ECE = sum over bins of (share of places in the bin) * |accuracy - mean confidence|, with the confidence of the
    most likely class in equal-width bins. Brier = sum over classes of (p - [class is the label])^2, from 0 to 2.
    ECE of few places is biased upward, in base and change alike.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model.
        batches: labelled data.
        bins: how many equal bins of confidence.
        nulls: how many random changes of the same size the noise floor is measured with.
        level: of the intervals, from a bootstrap over items.
        draws: of the bootstrap.
        seed: of bootstrap and nulls.
        measured: the paired runs, where they have been made.

    Returns:
        `bins`; `measures`: "ece", "brier", "confidence"; `reliability`: for base and changed, by bin: `places`,
        `confidence`, `accuracy`.
    """
    if bins < 1:
        raise RequestError(f"bins={bins}", expected="at least 1", do="bins=15")
    measured = runs(model, change, batches, nulls=nulls, seed=seed) if measured is None else measured
    options: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    paired = measured["change"]
    return {
        **overview(measured),
        "bins": bins,
        "measures": {
            "ece": measure(
                measured,
                lambda p: torch.cat([binned(p, "new", bins), binned(p, "base", bins)], 1),
                lambda sums: ece(sums[:, : 3 * bins]) - ece(sums[:, 3 * bins :]),
                unit="probability",
                better="lower",
                base=lambda p: float(ece(binned(p, "base", bins).sum(0, keepdim=True))[0]),
                new=lambda p: float(ece(binned(p, "new", bins).sum(0, keepdim=True))[0]),
                name="ece",
                **options,
            ),
            **averages(
                measured,
                {
                    "brier": Average(
                        "squared probability", "lower", base=lambda p: p.base_brier, new=lambda p: p.new_brier
                    ),
                    "confidence": Average("probability", "zero", base=lambda p: p.base_top, new=lambda p: p.new_top),
                },
                **options,
            ),
        },
        "reliability": {which: _reliability(paired, which, bins) for which in ("base", "new")},
    }


def binned(paired: Paired, which: str, bins: int) -> Tensor:
    """Return by item and bin: places, summed confidence, right places; float64 [items, 3 * bins]."""
    top, right = getattr(paired, f"{which}_top").double(), getattr(paired, f"{which}_right").double()
    index = (top * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(paired.items, 3, bins, dtype=torch.float64)
    for column, value in enumerate((torch.ones_like(top), top, right)):
        sums[:, column].view(-1, bins).index_put_((paired.item, index), value, accumulate=True)
    return sums[sums[:, 0].sum(1) > 0].flatten(1)


def ece(sums: Tensor) -> Tensor:
    """Return the expected calibration error of summed bins [b, 3 * bins]."""
    count, confidence, right = sums.chunk(3, dim=1)
    return (confidence - right).abs().sum(1) / count.sum(1)


def _reliability(paired: Paired, which: str, bins: int) -> dict[str, list[float]]:
    count, confidence, right = binned(paired, which, bins).sum(0).chunk(3)
    safe = count.clamp(min=1)
    return {"places": numbers(count), "confidence": numbers(confidence / safe), "accuracy": numbers(right / safe)}
