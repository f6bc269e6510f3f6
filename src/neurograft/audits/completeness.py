"""Whether a circuit loses what the model loses when heads are knocked out of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neurograft.audits._changes import as_change
from neurograft.audits._circuits import bench, need_circuit
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.seeds import generator
from neurograft.core.taps.circuit import Circuit, Unit, units_of, without


@method(
    paper="entity-tracking",
    needs={"batches"},
    departs="Accuracies are not rounded.",
)
def completeness(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    circuit: Circuit | None = None,
    reference: Sequence[Batch] | None = None,
    query: str = "end-2",
    metric: str = "accuracy",
    sets: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Knock sets K of heads out of the circuit C and out of the whole model M, and compare F(C - K) with F(M - K).

    K: every group, and random sets that hold each head of the circuit with probability a half.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model, on which it is done; an empty graft for the base.
        batches: prompts with answers.
        circuit: groups of heads by name.
        reference: prompts to take means over.
        query: the place whose token "mention" is like.
        metric: F: "accuracy" or "probability".
        sets: random sets.
        seed: names them.

    Returns:
        `sets`: name, `heads` knocked out, `circuit`, `model`, `gap` = |F(C - K) - F(M - K)|; `gap`, the mean over the
        random sets, and `group_gap`, that over the groups.

    Raises:
        RequestError: no circuit or reference prompts.
    """
    chosen, made = need_circuit(circuit), as_change(model, change)
    every, rng = units_of(chosen), generator(seed, "completeness")
    knocked: list[tuple[str, list[Unit]]] = [(name, [u for u in every if u[0] == name]) for name in chosen]
    for i in range(sets):
        flags = torch.randint(2, (len(every),), generator=rng).tolist()
        knocked.append((f"random {i}", [u for u, flag in zip(every, flags) if flag]))
    found: list[dict[str, Any]] = []
    with bench(made, batches, reference, query=query, metric=metric) as run:
        for name, gone in knocked:
            alone, whole = run.alone(without(chosen, gone)), run.knocked(chosen, gone)
            found.append({"set": name, "heads": len(gone), "circuit": alone, "model": whole, "gap": abs(alone - whole)})

    def mean(part: Sequence[dict[str, Any]]) -> float | None:
        return sum(float(p["gap"]) for p in part) / len(part) if part else None

    return {"sets": found, "gap": mean(found[len(chosen) :]), "group_gap": mean(found[: len(chosen)])}
