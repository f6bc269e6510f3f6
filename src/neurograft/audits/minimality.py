"""Which heads of a circuit matter beside the others of their group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from neurograft.audits._changes import as_change
from neurograft.audits._circuits import bench, need_circuit
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.taps.circuit import Bench, Circuit, Unit, units_of, without


@method(
    paper="entity-tracking",
    needs={"batches"},
    departs="Pairs of heads in one layer, or of one number in two layers, are left out together too; the reference's "
    "comparison takes only the first of such a pair away. Accuracies are not rounded.",
)
def minimality(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    circuit: Circuit | None = None,
    reference: Sequence[Batch] | None = None,
    query: str = "end-2",
    elsewhere: str = "ablate",
    metric: str = "accuracy",
    share: float = 0.3,
    threshold: float = 0.01,
) -> dict[str, Any]:
    """Score each head v by what it adds to its circuit C less the other heads K that make it matter most.

    K holds of v's group the heads k with the largest F(C - k) - F(C - k - v), a share of the group, while that is
    above 0. The score is F(C - K) / F(C - K - v) - 1; a head is kept if it reaches the threshold.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model, on which the circuit is run; an empty graft for the base.
        batches: prompts with answers.
        circuit: groups of heads by name.
        reference: prompts to take means over.
        query: the place whose token "mention" is like.
        elsewhere: "ablate" or "keep".
        metric: F: "accuracy" or "probability".
        share: of the group in K, rounded up.
        threshold: the least score of a head that is kept.

    Returns:
        `heads`: group, site, head, `without` (K as site and head), `with_it`, `less_it`, `score` (None for infinite),
        `kept`; and the `circuit` of those kept.

    Raises:
        RequestError: no circuit or reference prompts, or a circuit that answers nothing.
    """
    chosen, made = need_circuit(circuit), as_change(model, change)
    every, tried = units_of(chosen), list[Unit]()
    found: list[dict[str, Any]] = []
    with bench(made, batches, reference, query=query, elsewhere=elsewhere, metric=metric) as run:
        if not run.alone(chosen):
            raise RequestError(
                f"a circuit whose {metric} is 0", expected="one that answers something", do="metric='probability'"
            )
        for name in chosen:
            mine = [u for u in every if u[0] == name]
            pairs = _pairs(run, chosen, mine)
            for v in mine:
                tried.append(v)
                gain = sorted(((pairs[k, k] - pairs[v, k], k) for k in mine), key=lambda x: -x[0])
                less = [k for g, k in gain[: math.ceil(share * len(mine))] if g > 0 and k != v]
                before, after = (run.alone(without(chosen, [*less, *also])) for also in ([], [v]))
                score = before / after - 1 if after else math.inf if before else 0.0
                found.append(
                    {
                        "group": name,
                        "site": v[1],
                        "head": v[2],
                        "without": [list(k[1:]) for k in less],
                        "with_it": before,
                        "less_it": after,
                        "score": score if math.isfinite(score) else None,
                        "kept": score >= threshold,
                    }
                )
    gone = [u for u, h in zip(tried, found) if not h["kept"]]
    return {"heads": found, "circuit": without(chosen, gone)}


def _pairs(run: Bench, circuit: Circuit, mine: Sequence[Unit]) -> dict[tuple[Unit, Unit], float]:
    """Return F of the circuit less each pair of heads, and less each one."""
    found: dict[tuple[Unit, Unit], float] = {}
    for i, a in enumerate(mine):
        for b in mine[i:]:
            found[a, b] = found[b, a] = run.alone(without(circuit, [a, b]))
    return found
