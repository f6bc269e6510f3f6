"""What was lost on a kept domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._averages import Average, averages
from neurograft.audits._measures import by_metric, histogram, numbers, overview
from neurograft.audits._paired import Metric, Runs, runs
from neurograft.core.card import method
from neurograft.core.context import Batch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@method(needs={"batches", "labels"}, claims={"empty_is_zero", "noise_floor"})
def loss(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    metric: Metric | None = None,
    nulls: int = 8,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    measured: Runs | None = None,
) -> dict[str, Any]:
    """Measure how much less likely the changed model finds the labels of a domain, paired item by item.

    The change is [log p_base(label) - log p_changed(label)] averaged over labelled places, in nats: positive is
    worse. Pairing takes the items' own difficulty out of it, so that changes far below the spread of the loss are
    seen.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model.
        batches: data of the domain.
        metric: (model, batch) -> one number for each row, higher is better, for models whose outputs are no classes;
            its fall is then the loss, in its own unit.
        nulls: how many random changes of the same size the noise floor is measured with.
        level: of the intervals, from a bootstrap over items.
        draws: of the bootstrap.
        seed: of bootstrap and nulls.
        measured: the paired runs, where they have been made.

    Returns:
        `measures`: "loss" and "errors" (share of places whose most likely class is not the label), each with base,
        changed, change with interval and noise floor; `histogram` and `quantiles` of the change by item; `worst`,
        the items that lost most.
    """
    if metric is not None:
        return _by_metric(model, change, batches, metric, nulls=nulls, level=level, draws=draws, seed=seed)
    measured = runs(model, change, batches, nulls=nulls, seed=seed) if measured is None else measured
    options: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    seen, paired = overview(measured), measured["change"]
    wanted = {
        "loss": Average(f"nats per {seen['place']}", "lower", base=lambda p: -p.base_logp, new=lambda p: -p.new_logp),
        "errors": Average(
            f"share of {seen['place']}s", "lower", base=lambda p: ~p.base_right, new=lambda p: ~p.new_right
        ),
    }
    sums = wanted["loss"].table(paired)
    return {
        **seen,
        "measures": averages(measured, wanted, **options),
        **_by_item(sums[:, 0] / sums[:, 1], paired.item.unique()),
    }


def _by_item(changes: Tensor, names: Tensor) -> dict[str, Any]:
    order = changes.argsort(descending=True, stable=True)[:5]
    quantiles = changes.quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return {
        "histogram": histogram(changes),
        "quantiles": dict(zip(map(str, QUANTILES), numbers(quantiles))),
        "worst": [{"item": int(names[i]), "change": float(changes[i])} for i in order],
    }


def _by_metric(
    model: nn.Module, change: object, batches: Sequence[Batch], metric: Metric, **options: Any
) -> dict[str, Any]:
    made, moved = by_metric(model, change, batches, metric, unit="of the metric per item", better="lower", **options)
    nulls = len(made["noise_floor"]["nulls"])
    seen = {"items": len(moved), "items_without_labels": 0, "places": len(moved), "place": "item", "nulls": nulls}
    return {**seen, "measures": {"loss": made}, **_by_item(moved, torch.arange(len(moved)))}
