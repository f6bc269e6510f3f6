"""How much of a model's skill a circuit keeps when every other head is at its mean, before and after a change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from neurograft.audits._changes import Change, as_change
from neurograft.audits._circuits import bench, need_circuit
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.taps.circuit import Circuit, random_like, ratio


@method(
    paper="entity-tracking",
    needs={"batches"},
    departs="Means are told by the distance from the end of the prompt, which for prompts of one length are the "
    "reference's positions. Accuracies are not rounded. The random circuit draws its heads without repetition.",
)
def faithfulness(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    circuit: Circuit | None = None,
    reference: Sequence[Batch] | None = None,
    query: str = "end-2",
    elsewhere: str = "ablate",
    metric: str = "accuracy",
    controls: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the same circuit with the whole model, in the base and under a change.

    Faithfulness = circuit / model. Heads outside the circuit, and those of the circuit away from their places, are
    held at their means over the reference prompts, each model at its own.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model, in which the same circuit is run.
        batches: prompts with answers.
        circuit: groups of heads by name, `core.taps.circuit.Group`.
        reference: prompts to take means over.
        query: the place whose token "mention" is like.
        elsewhere: what heads do at places where no group is at work: "ablate" or "keep".
        metric: "accuracy" or "probability".
        controls: random circuits of the same sizes and places.
        seed: names them.

    Returns:
        `base` and `changed`: `model`, `circuit`, `faithfulness` (None where the model knows nothing), `random` (the
        controls' faithfulness); `heads`, of `of` in the model, counted once each.

    Raises:
        RequestError: no circuit, no reference prompts, or shorter ones than the prompts.
    """
    chosen, made = need_circuit(circuit), as_change(model, change)
    others = [random_like(chosen, seed + i) for i in range(controls)]

    def measured(of: Change) -> dict[str, Any]:
        with bench(of, batches, reference, query=query, elsewhere=elsewhere, metric=metric) as run:
            whole, alone = run.whole(), run.alone(chosen)
            control = [ratio(run.alone(other), whole) for other in others]
        return {"model": whole, "circuit": alone, "faithfulness": ratio(alone, whole), "random": control}

    heads = {(s, int(i)) for group in chosen.values() for s, ids in group.where.ids.items() for i in ids}
    total = next(iter(chosen.values())).where.total
    return {"base": measured(Change(model)), "changed": measured(made), "heads": len(heads), "of": total}
