"""Surgical fine-tuning of encoders: the layers with the least Fisher information stay as they are."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="surgical-lm",
    kinds={"layer"},
    task="text-classification",
    departs="The reference differentiates the raw logit of the label and sees its first batch again and again; here F "
    "is of log p(y|x), over different examples, as the paper defines it. The head may be trained for a moment before "
    "the scores are taken (rehearse=); the paper does not say whether it was. On a tiny BERT neither the stability of "
    "the ranking nor an advantage of the best half showed; the proof's record has the numbers.",
)
def surgical_lm(
    *,
    keep: float = 0.5,
    examples: int = 100,
    aggregate: str = "fro",
    labels: str = "true",
    rehearse: int = 0,
    lr: float = 5e-5,
    epochs: float = 10.0,
    batch: int = 16,
    accumulate: int = 2,
    warmup: float = 0.1,
    decay: float = 0.01,
) -> Recipe:
    """Score each layer by its empirical Fisher information, freeze the lowest, tune all else.

    Embeddings, pooler and head stay trainable. F = mean over examples of (d log p(y|x) / dw)^2.

    Args:
        keep: share of the layers that is tuned.
        examples: labelled examples the scores are taken from.
        aggregate: "fro": sum over a layer's tensors of the Frobenius norm of F; "sum"; "mean".
        labels: "true", or "sampled" from the model.
        rehearse: steps for which the head alone is trained before.
        lr: learning rate, linear with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        accumulate: batches in a step.
        warmup: share of the steps.
        decay: weight decay.
    """
    fisher = ("fisher", {"aggregate": aggregate, "labels": labels})
    by = ("rehearsed", {"by": fisher, "steps": rehearse}) if rehearse else fisher
    args = training(
        lr=lr, epochs=epochs, batch=batch, warmup=warmup, decay=decay, gradient_accumulation_steps=accumulate
    )
    return Recipe(
        "surgical_lm",
        (
            {"do": "locate", "by": by, "units": "layer", "limit": examples},
            {"do": "select", "by": "bottom", "fraction": 1 - keep, "as": "frozen"},
            {"do": "tune", "adapter": "dense", "protect": "$frozen", "args": args},
        ),
        paper="surgical-lm",
    )
