"""Half fine-tuning: in each round a random half of the matrices trains and the other half stays."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="hft",
    kinds={"module"},
    task="text-generation",
    departs="One run is one round; a sequence of tasks is a sequence of runs with round=0, 1, ... on the model that "
    "carries the earlier grafts. Batch and warm-up are ours. Fused matrices train or stay whole.",
)
def hft(
    *,
    round: int = 0,
    granularity: str = "category",
    pairs: bool = False,
    lr: float = 2e-5,
    epochs: float = 2.0,
    batch: int = 16,
    warmup: float = 0.03,
    decay: float = 0.0,
) -> Recipe:
    """Train 2 of q, k, v, o in each layer, 2 or 1 of gate, up, down, one of its two norms; embeddings and head always.

    `neurograft.pipeline.put_back` is the pilot's half-reset: part of a tuned model put back to the base.

    Args:
        round: names the draw: number of the task or stage.
        granularity: "category", or the ablations "layer" and "model".
        pairs: of attention one of q and o and one of k and v, exactly half of it also under grouped queries.
        lr: learning rate, linear with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        decay: weight decay.
    """
    by = ("halves", {"granularity": granularity, "pairs": pairs, "round": round})
    return Recipe(
        "hft",
        (
            {"do": "locate", "by": by, "units": "module"},
            {"do": "select", "by": "threshold", "above": 0.5},
            {
                "do": "tune",
                "adapter": "dense",
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, decay=decay),
            },
        ),
        paper="hft",
    )
