"""LIFT: the weights that are large once their matrix is reduced to a low rank, chosen anew as training goes on."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="lift",
    kinds={"weight"},
    task="text-generation",
    departs="The chosen numbers are compact tensors of their own; the reference keeps dense weights and gradients and "
    "makes only the moments sparse. The learning-rate warm-up was not read and is 0 here. The randomised SVD draws "
    "its directions from a named generator and turns them twice.",
)
def lift(
    *,
    r: int = 64,
    budget: int = 128,
    interval: int = 400,
    svd: str = "exact",
    lr: float = 2e-4,
    epochs: float = 3.0,
    batch: int = 16,
    warmup: float = 0.0,
) -> Recipe:
    """Train the r(m+n) weights of each projection that are largest in its best low-rank approximation.

    Every so many steps the choice is made anew from the current weights. Entries that stay keep their moments, new
    ones begin at zero, and those that leave keep what they learned and stop moving.

    Args:
        r: rank to which a matrix is reduced for its scores: 64 for Llama-2-7B and Llama-3.2-3B, 128 for Llama-3-8B, 32
            for Llama-3.2-1B; commonsense 64 and 16.
        budget: LoRA rank that would cost as much: (m + n) * budget weights of each m x n matrix; 128 in all published
            settings but one of 32.
        interval: steps between two choices (400; 10 for Llama-3.2-3B; 2000 for commonsense).
        svd: "exact" or "random", see `locators.principal`.
        lr: learning rate, linear; 1e-4 for Llama-3-8B, 1e-4 and 5e-5 for commonsense.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    locate: dict[str, Any] = {
        "by": ("within", {"by": ("principal", {"r": r, "svd": svd}), "roles": "block"}),
        "units": "weight",
    }
    select: dict[str, Any] = {"by": ("lora_budget", {"r": budget})}
    args = training(
        lr=lr, epochs=epochs, batch=batch, warmup=warmup, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-6
    )
    return Recipe(
        "lift",
        (
            {"do": "locate", **locate},
            {"do": "select", **select},
            {
                "do": "tune",
                "adapter": "slice",
                "schedule": ("every", {"steps": interval, "moments": "keep"}),
                "reselect": {"locate": locate, "select": select},
                "args": args,
            },
        ),
        paper="lift",
    )
