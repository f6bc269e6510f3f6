"""What was gained on the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._averages import Average, averages
from neurograft.audits._compare import Paired
from neurograft.audits._measures import by_metric, measure, overview
from neurograft.audits._paired import Metric, Runs, runs
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import one_of

Metrics = Metric | Mapping[str, Metric] | None
BUILT_IN = ("likelihood", "accuracy", "exact")  # what `built_in` measures


@method(needs={"batches", "labels"}, claims={"empty_is_zero", "noise_floor"})
def gain(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    by: str = "auto",
    metrics: Metrics = None,
    nulls: int = 8,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    measured: Runs | None = None,
) -> dict[str, Any]:
    """Measure how much better the changed model does the task than the base, item by item.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model.
        batches: task data with labels.
        by: which measure decides: "likelihood" (log-probability of the labels), "accuracy" (the most likely class
            is the label, with the true labels before it), "exact" (in every place of an item), or the name of a
            metric; "auto" is the first metric if there is one, else "accuracy" for classifiers and "likelihood".
        metrics: a callable (model, batch) -> one number for each row, higher is better, or name -> callable.
        nulls: how many random changes of the same size the noise floor is measured with.
        level: of the intervals, from a bootstrap over items.
        draws: of the bootstrap.
        seed: of bootstrap and nulls.
        measured: the paired runs, where they have been made; with metrics and without them only the metrics are
            measured.

    Returns:
        `by`; `measures`: name -> base, changed, change with interval, noise floor; how much data was seen.

    Raises:
        RequestError: data without labels and no metric, or an unknown measure.
    """
    own = dict(metrics) if isinstance(metrics, Mapping) else {"metric": metrics} if metrics else {}
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    if measured is None and not own:
        measured = runs(model, change, batches, nulls=nulls, seed=seed)
    if measured is not None:
        found |= overview(measured) | {"measures": built_in(measured, **options)}
    for name, metric in own.items():
        made, _ = by_metric(model, change, batches, metric, nulls=nulls, unit=name, better="higher", **options)
        found.setdefault("items", made["change"]["n"])
        found.setdefault("measures", {})[name] = made
    if by == "auto":
        by = next(iter(own), "accuracy" if found.get("place") == "item" else "likelihood")
    return {"by": one_of(by, found["measures"], what="measure of the gain"), **found}


def built_in(measured: Runs, *, level: float, draws: int, seed: int) -> dict[str, Any]:
    """Return likelihood, accuracy and exact match."""
    place = overview(measured)["place"]
    options: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    wanted = {
        "likelihood": Average(f"nats per {place}", "higher", base=lambda p: p.base_logp, new=lambda p: p.new_logp),
        "accuracy": Average(f"share of {place}s", "higher", base=lambda p: p.base_right, new=lambda p: p.new_right),
    }
    found = averages(measured, wanted, **options)
    if place == "token":
        found["exact"] = measure(
            measured,
            lambda p: _exact(p, p.new_right) - _exact(p, p.base_right) * torch.tensor([1.0, 0.0]),
            unit="share of items",
            better="higher",
            base=lambda p: float(_exact(p, p.base_right)[:, 0].mean()),
            new=lambda p: float(_exact(p, p.new_right)[:, 0].mean()),
            name="exact",
            **options,
        )
    return found


def _exact(paired: Paired, right: Tensor) -> Tensor:
    """Return whether every place of an item is right, and 1, float64 [items, 2]."""
    sums = paired.per_item(right)
    return torch.stack([(sums[:, 0] == sums[:, 1]).double(), torch.ones(len(sums), dtype=torch.float64)], 1)
