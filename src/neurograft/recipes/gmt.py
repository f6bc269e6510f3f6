"""GMT: at every step, only the numbers with the largest gradients are updated."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="gmt",
    task="text-generation",
    departs="Inferred: the share kept (0.2), its scope (each tensor), the training arguments. By default the update is "
    "strict: nothing outside of the step's mask moves, and moments exist for the mask alone, so that a number "
    "that comes in begins at zero moments; strict=False sets gradients to zero and leaves the optimizer its memory, as "
    "public reimplementations do. Embeddings and head are masked like everything else.",
)
def gmt(
    *,
    keep: float = 0.2,
    scope: str = "tensor",
    strict: bool = True,
    moments: str = "keep",
    lr: float = 1e-5,
    epochs: float = 3.0,
    batch: int = 16,
    warmup: float = 0.03,
    decay: float = 0.0,
) -> Recipe:
    """Train everything, but at each step only the share with the largest gradients of the accumulation window.

    Args:
        keep: share that is updated; 1 is full fine-tuning.
        scope: "tensor" or "global", see `optimizers.gradient_masked`.
        strict: whether numbers outside of the mask stand still.
        moments: what becomes of the moments of numbers that stay, if strict: "keep" or "drop".
        lr: learning rate, linear.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        decay: weight decay.
    """
    masked = ("gradient_masked", {"keep": keep, "scope": scope, "strict": strict, "moments": moments})
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, decay=decay)
    return Recipe("gmt", ({"do": "tune", "adapter": "dense", "optimizer": masked, "args": args},), paper="gmt")
