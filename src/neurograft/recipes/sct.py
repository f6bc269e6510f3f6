"""SCT: a small dense map among the most active channels behind each attention, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="sct",
    kinds={"channel"},
    task="text-classification",
    departs="Drop path is not used. The learning rate, tuned for each task in the paper (7e-4 to 7.5e-2), is one "
    "number here. In post-norm encoders the stream behind attention is the sum before its norm. A fresh "
    "head is named in new.",
)
def sct(
    *,
    fraction: float = 0.125,
    skip: int = 1,
    place: str = "attention",
    start: str = "zero",
    new: Sequence[str] = (),
    lr: float = 1e-2,
    epochs: float = 100.0,
    batch: int = 64,
    warmup: float = 0.1,
    decay: float = 1e-4,
) -> Recipe:
    """Train x[..., S] += x[..., S] W^T + b, S the channels with the largest class-averaged norm in each block.

    Args:
        fraction: share of the channels of each block: 96 of 768 in the paper, 32 in its small variant.
        skip: tokens in front that do not count for the choice: 1, the class token.
        place: "attention", or "mlp" for the stream behind the whole block.
        start: W at the start: "zero", or the reference's "normal".
        new: the fresh head's name, such as "classifier", where the task has none yet.
        lr: learning rate, cosine with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        decay: weight decay.
    """
    behind = one_of(place, ("attention", "mlp"), what="place") == "mlp"
    salient = ("salient", {"skip": skip})
    by = salient if behind else ("within", {"by": salient, "roles": "attention"})
    return Recipe(
        "sct",
        (
            {"do": "locate", "by": by, "units": "channel", "at": "residual" if behind else None},
            {"do": "select", "by": "top", "fraction": fraction, "per": "site"},
            {
                "do": "tune",
                "adapter": ("channels", {"start": start}),
                "new": list(new),
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine", decay=decay),
            },
        ),
        paper="sct",
    )
