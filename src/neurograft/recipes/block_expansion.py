"""Block expansion: a few new blocks that start as the identity learn the task, and every old number stays."""

from __future__ import annotations

from collections.abc import Sequence

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="block-expansion",
    kinds={"layer"},
    task="text-generation",
    departs="The paper expands vision transformers; any pre-norm model is expanded here, and a fresh head is named in "
    "new. Training is counted in epochs, and the warm-up is the paper's share of its 10,000 steps.",
)
def block_expansion(
    *,
    blocks: int = 1,
    new: Sequence[str] = (),
    lr: float = 0.05,
    epochs: float = 10.0,
    batch: int = 128,
    warmup: float = 0.05,
    momentum: float = 0.9,
) -> Recipe:
    """Insert copies of layers whose attention and FFN write zeros, evenly spread, and train them and a fresh head.

    Args:
        blocks: how many: 1 to 4 for the paper's twelve layers; must divide the layers.
        new: the fresh head's name, such as "classifier", where the task has none yet.
        lr: learning rate of SGD, cosine with warm-up; 0.005 to 0.05 in the paper.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        momentum: of SGD.
    """
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine")
    tune = {
        "adapter": ("expansion", {"blocks": blocks}),
        "optimizer": ("SGD", {"momentum": momentum}),
        "new": list(new),
        "args": args,
    }
    return Recipe("block_expansion", ({"do": "tune", **tune},), paper="block-expansion")
