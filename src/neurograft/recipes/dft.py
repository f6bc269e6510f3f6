"""Dynamic fine-tuning: cross-entropy that trusts a token as far as the model does."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="dft",
    task="text-generation",
    departs="Batches of 16 instead of 256, so that small data make more than one step; the weight's power alpha is "
    "an extension (1 is the paper, 0 is plain cross-entropy).",
)
def dft(*, alpha: float = 1.0, lr: float = 5e-5, epochs: float = 1.0, batch: int = 16, warmup: float = 0.1) -> Recipe:
    """Tune the whole model with -sg(p_t)^alpha log p_t in place of -log p_t.

    Cross-entropy is a policy gradient with reward 1 / p_t, unbounded where the model disagrees with the data; the
    weight cancels it. Gains are reported for mathematics and code up to 7B; from a model that knows nothing of the
    task it learns slowly, since every right token starts with a small p_t.

    Args:
        alpha: power of the weight.
        lr: learning rate, cosine with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine")
    return Recipe("dft", ({"do": "tune", "objective": ("dft", {"alpha": alpha}), "args": args},), paper="dft")
