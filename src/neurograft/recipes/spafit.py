"""SPAFIT: the lowest layers stay, the middle ones train biases, the upper ones low-rank updates and biases."""

from __future__ import annotations

from collections.abc import Sequence

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="spafit",
    kinds={"layer"},
    task="text-classification",
    departs="Cuts, matrices, rank and training arguments are inferred: the paper's text could not be read, only its "
    "three groups and the published share of trained numbers, which a rank of 64 on queries and values meets. Cuts "
    "are shares of the layers, so that they fit any depth. What lies behind the layers and is no pooler counts as "
    "head. For models without biases, middle='norm' is an extension.",
)
def spafit(
    *,
    cuts: Sequence[float] = (4 / 24, 9 / 24),
    matrices: Sequence[str] = ("q", "v"),
    r: int = 64,
    alpha: float | None = None,
    middle: str = "bias",
    pooler: bool = False,
    lr: float = 5e-4,
    epochs: float = 5.0,
    batch: int = 16,
    warmup: float = 0.06,
    decay: float = 0.01,
) -> Recipe:
    """Train strata of layers in three ways, and the task's head.

    Args:
        cuts: where the second and the third group begin, as shares of the layers or in layers; the second preset of
            24 layers is (4, 14).
        matrices: roles of the matrices of the third group that get scale * B A; their biases stay.
        r: its rank.
        alpha: scale = alpha / r; r if None.
        middle: "bias", or "norm" where there are none.
        pooler: train the pooler too.
        lr: learning rate, linear with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        decay: weight decay.
    """
    first, second = cuts
    plan = [
        {"upto": first, "train": []},
        {"upto": second, "train": [middle]},
        {"train": [middle, "low_rank"]},
    ]
    ends = {"pooler": "all" if pooler else "frozen", "head": "all"}
    adapter = ("strata", {"plan": plan, "low_rank": list(matrices), "r": r, "alpha": alpha, **ends})
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, decay=decay)
    return Recipe("spafit", ({"do": "tune", "adapter": adapter, "args": args},), paper="spafit")
