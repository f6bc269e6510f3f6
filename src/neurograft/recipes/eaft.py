"""Entropy-adaptive fine-tuning: tokens the model is sure about weigh little."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="eaft",
    task="text-generation",
    departs="The entropy is divided by 3.0 as in the released code, where the paper writes ln 20. Learning rate, "
    "batch and epochs are not the paper's, which tunes 4B to 32B models.",
)
def eaft(
    *,
    alpha: float = 1.0,
    top: int = 20,
    scale: float = 3.0,
    lr: float = 1e-5,
    epochs: float = 1.0,
    batch: int = 16,
    warmup: float = 0.1,
) -> Recipe:
    """Tune the whole model with -sg(H_t / scale)^alpha log p_t, H_t the entropy over the `top` likeliest tokens.

    A token on which the model is sure and the data contradict it has a large loss and a small entropy; tuning on it
    costs old knowledge. The mean divides by the number of tokens, so that the effective learning rate falls too.

    Args:
        alpha: power of the weight; 0 is plain cross-entropy.
        top: logits that count for the entropy.
        scale: the entropy's divisor.
        lr: learning rate, cosine with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine")
    objective = ("eaft", {"alpha": alpha, "top": top, "scale": scale})
    return Recipe("eaft", ({"do": "tune", "objective": objective, "args": args},), paper="eaft")
