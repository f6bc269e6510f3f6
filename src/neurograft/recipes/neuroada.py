"""NeuroAda: every output neuron trains its few largest incoming weights."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

SCORES = ("magnitude", "gradient", "random")


@method(
    paper="neuroada",
    kinds={"weight"},
    task="text-generation",
    departs="The chosen numbers of the weight itself are trained, from their own values, where the reference trains "
    "deltas from zero and rebuilds the dense weight in every forward pass; at weight decay 0, the paper's, both are "
    "the same numbers. The reference's approximate shared columns, which add the bias twice, are left out, and so is "
    "its option to train a fraction of the rows; with per='site' or 'global' k counts entries there, not in each row.",
)
def neuroada(
    *,
    k: int = 1,
    score: str = "magnitude",
    smallest: bool = False,
    per: str = "row",
    limit: int | None = 256,
    lr: float = 8e-3,
    epochs: float = 3.0,
    batch: int = 8,
    warmup: float = 0.1,
) -> Recipe:
    """Train the k largest weights of every output row of every projection of every layer; biases stay frozen.

    Args:
        k: entries of each row.
        score: "magnitude"; "gradient" by the accumulated gradient; "random".
        smallest: take the k lowest instead.
        per: the quota: "row"; "site" or "global" take as many entries of each matrix or of all of them, as controls
            (`k` counts entries there).
        limit: examples for the gradient.
        lr: learning rate, linear with warm-up: the paper has 8e-3 for k = 1, 7e-4 with warm-up 0.06 for k = 20.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    found: dict[str, Any] = {"magnitude": "magnitude", "gradient": ("gradient", {"score": "l1"}), "random": "noise"}
    by = ("within", {"by": found[one_of(score, SCORES, what="score")], "roles": "block"})
    return Recipe(
        "neuroada",
        (
            {"do": "locate", "by": by, "units": "weight", "limit": limit},
            {"do": "select", "by": "bottom" if smallest else "top", "count": k, "per": per},
            {"do": "tune", "adapter": "slice", "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup)},
        ),
        paper="neuroada",
    )
