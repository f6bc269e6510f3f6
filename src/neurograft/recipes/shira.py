"""SHiRA's random rule: as many random weights of each projection as a low-rank update would have numbers."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import unscored
from neurograft.recipes._training import training


@method(
    kinds={"weight"},
    task="text-generation",
    departs="Sparse High Rank Adapters (arXiv 2406.13175) as in PEFT's `SHIRA` with its mask 'random'; the chosen "
    "numbers of the weight itself are trained, where PEFT trains differences from zero beside it.",
)
def shira(
    *, r: int = 32, roles: str = "block", lr: float = 1e-3, epochs: float = 3.0, batch: int = 16, warmup: float = 0.0
) -> Recipe:
    """Train r (m + n) random weights of every m x n projection.

    Args:
        r: LoRA rank that would cost as much.
        roles: projections: "attention", "ffn" or "block" for both.
        lr: learning rate, linear.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    return Recipe(
        "shira",
        (
            unscored("weight", {"roles": roles}),
            {"do": "select", "by": ("lora_budget", {"r": r})},
            {"do": "tune", "adapter": "slice", "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup)},
        ),
    )
