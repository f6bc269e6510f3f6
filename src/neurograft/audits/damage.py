"""Where a loss sits: what comes back when a part of the change is taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from neurograft.audits._changes import Change, as_change, evaluating
from neurograft.audits._layers import blocks, by_layer
from neurograft.audits._measures import as_measure
from neurograft.audits._scoring import Sums, label_sums, mean_fall
from neurograft.audits._statistics import estimate
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.examples import size

PARTS = ("layer", "parameter")


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
        base = label_sums(model, used)
        floor = mean_fall(base, label_sums(model, used, split=True))
        with made.on() as changed:
            whole = label_sums(changed, used)
        found = []
        for name, held in parts.items():
            with made.without(held) as rest:
                entries = sum(made.weights[n].region.numel for n in held)
                found.append(_part(name, entries, label_sums(rest, used), whole, level, draws, seed))
        if made.operations:
            plain = as_change(model, [replace(g, operations=()) for g in made.grafts])
            found.append(_part("operations", 0, _operated(plain, used), whole, level, draws, seed))
    found.sort(key=lambda part: -part["change"]["value"])
    total = mean_fall(base, whole)
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "n": int((base[1] > 0).sum())}
    return {
        "by": by,
        "items": int((base[1] > 0).sum()),
        "parts": found,
        "whole": total,
        "rest": total - sum(p["change"]["value"] for p in found),
        "measures": {
            "worst_part": as_measure(
                found[0]["change"] if found else nothing,
                unit="nats",
                better="lower",
                noise_floor={"value": abs(floor), "rerun": abs(floor)},
                part=found[0]["name"] if found else None,
            )
        },
    }


def _operated(plain: Change, used: list[Batch]) -> Sums:
    with plain.on() as changed:
        return label_sums(changed, used)


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
        rows += size(batch)
    if not found:
        raise RequestError("no batches", expected="at least one", do="give data with at least one row")
    return found
