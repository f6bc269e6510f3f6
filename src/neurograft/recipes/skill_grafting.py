"""Skill grafting: the few fine-tuned numbers that carry the skill, pasted onto the base without retraining."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import everything
from neurograft.recipes._training import training


@method(
    paper="skill-grafting",
    kinds={"weight"},
    task="text-generation",
    departs="The candidates are the weights of attention and FFN matrices, and the fine-tune moves these alone: norms "
    "and biases, a few numbers that the paper counts among its candidates, stay at the base with embeddings and head. "
    "The last mask is kept, where the reference keeps the one with the best train and validation score. No L1 pull "
    "during fine-tuning: use plain SGD, whose change is sparse enough, as the paper's main setting.",
)
def skill_grafting(
    *,
    fraction: float = 1e-4,
    lr: float = 5e-3,
    epochs: float = 10.0,
    batch: int = 8,
    optimizer: str = "SGD",
    mask_lr: float = 1e7,
    mask_steps: int = 100,
    offset: float = 10.0,
) -> Recipe:
    """Fine-tune, then learn which few entries of the change to keep: theta = base + gamma * (tuned - base).

    gamma starts as the entries that moved most, over all matrices at once, and s learns to flip its bits:
    gamma = patch * (1 - sigmoid(s - offset)) + (1 - patch) * sigmoid(s - offset), s in [0, 1) at the start, by plain
    gradient descent on the task's loss, one step for a pass over the data. The graft is gamma rounded.

    Args:
        fraction: share of the candidate entries in the patch at the start.
        lr: learning rate of the fine-tune, constant.
        epochs: its passes over the data.
        batch: examples in a batch.
        optimizer: of the fine-tune.
        mask_lr: learning rate of s; sigmoid' and the change are tiny.
        mask_steps: steps of s.
        offset: how far a bit begins from flipping.
    """
    plain: dict[str, Any] = {"warmup": 0.0, "schedule": "constant", "batch": batch}
    mask = {"toward": "$tuned", "shape": "flip", "at": offset, "patch": fraction}
    # However many batches a window may hold, it ends with the data.
    whole: dict[str, Any] = {"gradient_accumulation_steps": 1_000_000, "max_grad_norm": 0.0}
    return Recipe(
        "skill_grafting",
        (
            *everything("column", {"roles": ["block"]}),
            {
                "do": "tune",
                "adapter": "dense",
                "optimizer": optimizer,
                "args": training(lr=lr, epochs=epochs, **plain),
                "as": "tuned",
            },
            {
                "do": "tune",
                "adapter": ("mask", mask),
                "optimizer": "SGD",
                "args": training(lr=mask_lr, epochs=mask_steps, **plain, **whole),
            },
        ),
        paper="skill-grafting",
    )
