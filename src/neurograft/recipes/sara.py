"""SaRA: numbers of a model that are near zero are put to use, held to a low rank, and fixed once they have grown."""

from __future__ import annotations

import math
from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="sara",
    kinds={"weight"},
    task="text-generation",
    departs="The paper tunes diffusion models; nothing in it asks for one. Numbers start from their own values, where "
    "the reference writes their sizes back and so flips signs. Weight decay leaves out norms and biases, as the "
    "Trainer does. The nuclear norm counts for matrices with both sides above 16, not 64. A tied parameter is trained "
    "for both its uses. Passes over the data and batch size are ours.",
)
def sara(
    *,
    t: float = 2e-3,
    rank_weight: float = 5e-4,
    progressive: int | None = 2500,
    lr: float | None = None,
    epochs: float = 3.0,
    batch: int = 4,
    warmup: float = 0.0,
    decay: float = 1e-2,
) -> Recipe:
    """Train every number with |p| < t, of all parameters; in the middle, fix those that have grown past t.

    Args:
        t: threshold: 2e-3 for Stable Diffusion 1.5, below which are 10 to 20 % of the numbers.
        rank_weight: weight of the nuclear norm in the loss; 0 for none.
        progressive: step at which those that are still below t go on, with fresh moments; about half the training.
            None for never.
        lr: learning rate, constant; 1e-3 * exp(-350 t) if None.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        decay: weight decay.
    """
    locate: dict[str, Any] = {"by": ("within", {"by": "magnitude", "entries": True}), "units": "module"}
    select: dict[str, Any] = {"by": ("threshold", {"below": t})}
    rate = 1e-3 * math.exp(-350 * t) if lr is None else lr
    tune: dict[str, Any] = {
        "do": "tune",
        "adapter": ("slice", {"tied": "both"}),
        "args": training(
            lr=rate, epochs=epochs, batch=batch, warmup=warmup, schedule="constant_with_warmup", decay=decay
        ),
    }
    if rank_weight:
        tune["anchor"] = ("nuclear", {"weight": rank_weight})
    if progressive is not None:
        tune["schedule"] = ("every", {"steps": progressive, "until": progressive, "moments": "drop"})
        tune["reselect"] = {"locate": locate, "select": select}
    return Recipe("sara", ({"do": "locate", **locate}, {"do": "select", **select}, tune), paper="sara")
