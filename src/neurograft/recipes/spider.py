"""SPIDER: numbers whose size matters more to the base than their gradient to the task stay what they were."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="spider",
    task="text-generation",
    departs="The paper tunes the language model and the connector of LLaVA and VILA; every parameter of any model is "
    "tuned here. Learning rate, batch and warm-up are LLaVA's usual ones and were not read.",
)
def spider(
    *,
    optimizer: str = "AdamW",
    lr: float = 2e-5,
    epochs: float = 5.0,
    batch: int = 16,
    warmup: float = 0.03,
    decay: float = 0.0,
) -> Recipe:
    """Train everything, and after each step go back to the base where |w0| outranks the sum of gradients.

    Two more copies of the model are held beside the optimizer's moments; see `optimizers.anchored`.

    Args:
        optimizer: makes the steps.
        lr: learning rate, cosine with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        decay: weight decay.
    """
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine", decay=decay)
    how = ("anchored", {"optimizer": optimizer})
    return Recipe("spider", ({"do": "tune", "adapter": "dense", "optimizer": how, "args": args},), paper="spider")
