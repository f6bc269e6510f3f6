"""One measured number in the shape every audit reports it: base, changed, change with interval, noise floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._compare import Paired
from neurograft.audits._paired import Metric, Runs, metric_runs, switches_of
from neurograft.audits._statistics import estimate, predicted, ratio
from neurograft.core.context import Batch

TAIL = 0.05
BINS = 24
Table = Callable[[Paired], Tensor]
Statistic = Callable[[Tensor], Tensor]


def measure(
    runs: Runs,
    table: Table,
    statistic: Statistic = ratio,
    *,
    unit: str,
    better: str,
    base: Callable[[Paired], float] | None = None,
    new: Callable[[Paired], float] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    name: str = "",
) -> dict[str, Any]:
    """Return a measure of a change.

    Args:
        runs: what was measured under the change, the rerun and the nulls.
        table: sums by item, [n, m]; the statistic of their sum is the change.
        statistic: summed columns [b, m] -> [b].
        unit: of the number.
        better: "higher", "lower" or "zero": where a good change would lie.
        base: the number for the base, if it has one.
        new: the number under the change.
        level: of the interval.
        draws: of the bootstrap.
        seed: of the bootstrap.
        name: tells this bootstrap from others.

    Returns:
        `unit`, `better`, `base`, `changed`, `change` (see `estimate`) and `noise_floor` (see `floor`).
    """
    return as_measure(
        estimate(table(runs["change"]), statistic, level=level, draws=draws, seed=seed, name=name),
        unit=unit,
        better=better,
        base=base(runs["change"]) if base else None,
        changed=new(runs["change"]) if new else None,
        noise_floor=floor({k: float(statistic(table(r).sum(0, keepdim=True))[0]) for k, r in runs.items()}),
    )


def as_measure(
    change: Mapping[str, Any],
    *,
    unit: str,
    better: str,
    base: float | None = None,
    changed: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return one number as every audit reports it under `measures`.

    Args:
        change: see `estimate`.
        unit: of the number.
        better: "higher", "lower" or "zero": where a good change would lie.
        base: the number for the base, if it has one.
        changed: the number under the change.
        **more: `noise_floor`, and what else is to be said of it.
    """
    return {"unit": unit, "better": better, "base": base, "changed": changed, "change": change, **more}


def floor(values: Mapping[str, float], *, tail: float = TAIL) -> dict[str, Any]:
    """Return how much of a change is noise, as measured.

    Two things are noise: what the base itself moves when it runs again with every batch cut in two, and what
    re-seeding moves: random changes of the same size, in as many random places, differ from one another. What
    all of them share, their mean, is the price of so large a change and no noise; it is reported beside it.

    Args:
        values: run -> the change it measured; "rerun" and "null/..." are read.
        tail: chance that one more random change lies further above the mean of the random ones than `spread`.

    Returns:
        `value`, the larger of the two; `rerun`; `null_mean`; `null_spread`; `nulls`, their values; `tail`.
    """
    nulls = [v for k, v in values.items() if k.startswith("null/")]
    mean, spread = predicted(nulls, tail=tail)
    again = abs(values.get("rerun", 0.0))
    return {
        "value": max(again, spread),
        "rerun": again,
        "null_mean": mean,
        "null_spread": spread,
        "nulls": nulls,
        "tail": tail,
    }


def by_metric(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    metric: Metric,
    *,
    unit: str,
    better: str,
    nulls: int,
    level: float,
    draws: int,
    seed: int,
) -> tuple[dict[str, Any], Tensor]:
    """Return a callable's measure in the shape of `measure`, and its change by item, float64 [n].

    With better="lower" the number is the fall of the metric, of which more is better.
    """
    switches = switches_of(model, change, nulls=nulls, seed=seed)
    found, sign = metric_runs(model, switches, batches, metric), 1.0 if better == "higher" else -1.0
    base, new = found["change"]
    moved = sign * (new - base)
    columns = torch.stack([moved, torch.ones_like(base)], 1)
    made = as_measure(
        estimate(columns, level=level, draws=draws, seed=seed, name=unit),
        unit=unit,
        better=better,
        base=sign * float(base.mean()),
        changed=sign * float(new.mean()),
        noise_floor=floor({k: sign * float((b - a).mean()) for k, (a, b) in found.items()}),
    )
    return made, moved


def place(paired: Paired) -> str:
    """Return what one labelled place is called: an item of a classifier, a token of a language model.

    Items without any labelled place do not decide it.
    """
    counts = torch.bincount(paired.item)
    return "item" if int(counts.max()) == 1 else "token"


def histogram(values: Tensor, *, bins: int = BINS) -> dict[str, Any]:
    """Return counts between equal steps, one of them ending at 0, and the ends of the steps.

    With more than 100 values the outermost 1 % on each side share the end bins.

    Example:
        >>> histogram(torch.tensor([0.0, 1.0, 1.0]), bins=2)["counts"]
        [1, 2]
    """
    values = values.double()
    ends = values.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64)) if len(values) > 100 else values.aminmax()
    low, high = float(ends[0]), float(ends[1])
    if high <= low:
        low, high = low - 0.5, low + 0.5
    step = (high - low) / bins
    start = -math.ceil(-low / step - 1e-9) * step if low < 0 < high else low
    count = bins + 1 if start + bins * step < high - 1e-9 * step else bins
    edges = start + step * torch.arange(count + 1, dtype=torch.float64)
    index = torch.bucketize(values, edges[1:-1], right=True)
    return {"edges": edges.tolist(), "counts": torch.bincount(index, minlength=count).tolist()}


def overview(runs: Runs) -> dict[str, Any]:
    """Return how much data a run saw."""
    paired = runs["change"]
    used = int(paired.item.unique().numel())
    return {
        "items": used,
        "items_without_labels": paired.items - used,
        "places": len(paired),
        "place": place(paired),
        "classes": paired.classes,
        "nulls": sum(k.startswith("null/") for k in runs),
    }


def numbers(values: Sequence[float] | Tensor) -> list[float]:
    """Return plain numbers."""
    return [float(v) for v in values]
