"""Stable fine-tuning on few labels: lower layers frozen, learning rates that fall with depth, upper layers redrawn."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="biomed-stability",
    kinds={"layer"},
    task="text-classification",
    departs="The paper's searched values could not be read, only its menu; formulas are those of the code it builds "
    "on. Nothing but the decay is on by default, since the best treatment depends on model and task.",
)
def biomed_stability(
    *,
    freeze: float = 0,
    decay: float = 0.8,
    convention: str = "electra",
    reinit: int = 0,
    lr: float = 2e-5,
    epochs: float = 3.0,
    batch: int = 32,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
) -> Recipe:
    """Tune an encoder and its head with one or more treatments by depth, by AdamW with bias correction.

    `neurograft.audits.stability` compares runs with different seeds.

    Args:
        freeze: so many of the lowest layers, or that share of them, stay, and the embeddings with them; half is a
            start for base models.
        decay: the learning rate falls by it from layer to layer, 1 for none: 0.8 for small and base models, 0.9 for
            large ones; 0.95 goes with "few_sample".
        convention: "electra" or "few_sample"; see `neurograft.schedules.depth_decay`.
        reinit: so many of the top layers, and the pooler where there is one, start from fresh numbers.
        lr: learning rate, linear with warm-up.
        epochs: passes over the data; steps count more than passes where data are few.
        batch: examples in a batch.
        warmup: share of the steps.
        weight_decay: of matrices.
    """
    plan: list[dict[str, Any]] = [{"upto": freeze, "train": []}] if freeze else []
    plan += [{"upto": -reinit, "train": ["all"]}, {"train": ["redrawn"]}] if reinit else [{"train": ["all"]}]
    ends = {"embeddings": "frozen" if freeze else "all", "pooler": "redrawn" if reinit else "all", "head": "all"}
    step: dict[str, Any] = {"do": "tune", "adapter": ("strata", {"plan": plan, **ends})}
    if decay != 1:
        step["schedule"] = ("depth_decay", {"decay": decay, "convention": convention})
    step["args"] = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, decay=weight_decay)
    return Recipe("biomed_stability", (step,), paper="biomed-stability")
