"""Norms alone: their gains and shifts, or the few of them with the most Fisher information, and the head."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import everything
from neurograft.recipes._training import training


@method(
    paper="layernorm-key",
    kinds={"norm"},
    task="text-classification",
    departs="Inferred, since only the abstract was read: the share of entries kept (default all; for the paper's small "
    "part take fraction=0.2), that F is taken behind a briefly trained head, the training arguments. Entries of gains "
    "and shifts are chosen apart.",
)
def layernorm_key(
    *,
    fraction: float = 1.0,
    examples: int = 100,
    rehearse: int = 100,
    lr: float = 1e-3,
    epochs: float = 3.0,
    batch: int = 16,
    warmup: float = 0.1,
) -> Recipe:
    """Train the norms' entries, all or those with the highest empirical Fisher information, and the task's head.

    F = mean over examples of (d log p(y|x) / dw)^2, squared for each example before the mean.

    Args:
        fraction: share of all norm entries that is trained; 1 needs no scores.
        examples: labelled examples the scores are taken from.
        rehearse: steps for which the head alone is trained before.
        lr: learning rate, linear with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    if fraction < 1:
        score: Any = ("rehearsed", {"by": ("within", {"by": "fisher", "apart": True}), "steps": rehearse})
    else:
        score = ("within", {"by": "noise", "apart": True})
    return Recipe(
        "layernorm_key",
        (
            {"do": "locate", "by": score, "units": "norm", "limit": examples},
            {"do": "select", "by": "top", "fraction": fraction, "as": "norms"},
            *everything("module", {"roles": "head"}, name="head"),
            {"do": "neurograft.pipeline.joined", "of": ["norms", "head"]},
            {
                "do": "tune",
                "adapter": "slice",
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup),
            },
        ),
        paper="layernorm-key",
    )
