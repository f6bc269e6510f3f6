"""Where a loss sits: what comes back when a part of the change is taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._changes import Change, as_change, evaluating
from neurograft.audits._layers import blocks, by_layer
from neurograft.audits._scoring import scored, scored_in_halves
from neurograft.audits._statistics import estimate
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of

PARTS = ("layer", "parameter")
Sums = tuple[Tensor, Tensor]


@method(needs={"batches", "labels"}, claims={"empty_is_zero", "noise_floor"})
def damage(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    by: str = "layer",
    items: int = 64,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Take each layer's part out of the change, one at a time, and measure how much loss goes with it.

    A part's `change` is loss(whole change) - loss(change without the part), in nats per labelled place, paired by
    item: positive where the part does harm. Parts need not add up to the whole where layers work together; `rest`
    is the difference. New parameters stay in; operations are one part.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model.
        batches: data of the domain.
        by: "layer" or "parameter".
        items: at most about so many items are used.
        level: of the intervals, from a bootstrap over items.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `by`, `parts` sorted by harm (name, entries, `change` with interval), `whole`, `rest`, and `measures`:
        "worst_part" with the noise floor of the base run twice, every batch cut in two the second time.
    """
    one_of(by, PARTS, what="part")
    made = as_change(model, change)
    used = _some(batches, items)
    parts = by_layer(made.weights, blocks(model)) if by == "layer" else {n: [n] for n in made.weights}
    with evaluating(model, made.tuned):
        base = _sums(model, used)
        floor = _mean(base, _sums(model, used, split=True))
        with made.on() as changed:
            whole = _sums(changed, used)
        found = []
        for name, held in parts.items():
            with made.without(held) as rest:
                entries = sum(made.weights[n].region.numel for n in held)
                found.append(_part(name, entries, _sums(rest, used), whole, level, draws, seed))
        if made.operations:
            plain = as_change(model, [replace(g, operations=()) for g in made.grafts])
            found.append(_part("operations", 0, _operated(plain, used), whole, level, draws, seed))
    found.sort(key=lambda part: -part["change"]["value"])
    total = _mean(base, whole)
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "n": int((base[1] > 0).sum())}
    return {
        "by": by,
        "items": int((base[1] > 0).sum()),
        "parts": found,
        "whole": total,
        "rest": total - sum(p["change"]["value"] for p in found),
        "measures": {
            "worst_part": {
                "unit": "nats",
                "better": "lower",
                "base": None,
                "changed": None,
                "change": found[0]["change"] if found else nothing,
                "noise_floor": {"value": abs(floor), "rerun": abs(floor)},
                "part": found[0]["name"] if found else None,
            }
        },
    }


def _operated(plain: Change, used: list[Batch]) -> Sums:
    with plain.on() as changed:
        return _sums(changed, used)


def _part(name: str, entries: int, without: Sums, whole: Sums, level: float, draws: int, seed: int) -> dict[str, Any]:
    keep = whole[1] > 0
    table = torch.stack([without[0] - whole[0], whole[1]], 1)[keep]
    return {"name": name, "entries": entries, "change": estimate(table, level=level, draws=draws, seed=seed, name=name)}


def _some(batches: Sequence[Batch], items: int) -> list[Batch]:
    found: list[Batch] = []
    rows = 0
    for batch in batches:
        if rows >= items:
            break
        found.append(batch)
        rows += len(next(v for v in batch.values() if isinstance(v, Tensor)))
    if not found:
        raise RequestError("no batches", expected="at least one", do="give data with at least one row")
    return found


def _sums(model: nn.Module, batches: list[Batch], *, split: bool = False) -> Sums:
    """Return by item the summed log-probability of its labels and their number, float64 [items] twice."""
    sums, counts = [], []
    for batch in batches:
        found = scored_in_halves(model, batch) if split else scored(model, batch)
        logp = found.logits.float().log_softmax(-1).gather(1, found.labels.to(found.logits.device)[:, None])[:, 0]
        rows = found.rows.cpu()
        sums.append(torch.zeros(found.size, dtype=torch.float64).index_add_(0, rows, logp.double().cpu()))
        counts.append(torch.bincount(rows, minlength=found.size).double())
    return torch.cat(sums), torch.cat(counts)


def _mean(before: Sums, after: Sums) -> float:
    return float((before[0] - after[0]).sum() / before[1].sum())
