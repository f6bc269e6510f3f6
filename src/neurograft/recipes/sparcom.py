"""SPARCOM: the neurons and experts that an instruction category uses all the time, and how tuning alters them."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.ranges import share
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="sparcom",
    kinds={"neuron", "expert"},
    needs={"contrast"},
    task="text-generation",
    departs="The paper's text was not found, only its abstract and reviews with its formulas: the bar of 0.9 and the "
    "rule for experts, a share of the routed tokens, are ours. In experts a rate is taken over the tokens routed there "
    "(within=False for the published divisor, under which no rate exceeds its expert's share); in fused banks of "
    "experts a neuron fires where the product of gate and up is positive, since nothing shows the gate alone.",
)
def sparcom(
    *,
    pool: str | None = None,
    least: float = 0.9,
    within: bool = True,
    expert_share: float | None = None,
    lr: float = 1e-5,
    epochs: float = 1.0,
    batch: int = 8,
    length: int = 1024,
    warmup: float = 0.0,
) -> Recipe:
    """Locate each category's specific neurons, split them into general and unique, tune everything, compare.

    p_ij = share of the category's tokens at which the gate of neuron i in layer j is positive; specific if p_ij >=
    `least`. General are those of all categories, unique those of one alone; overlaps come with their chance. The
    outcome's state holds `specific`, `general`, `unique`, `pairs`, after tuning `alteration`, and the graft.

    Args:
        pool: file of rows with a column `group`, the category; if None, the data's own rows must have it.
        least: the bar of the rate, inclusive.
        within: inside of experts, count over the tokens routed there.
        expert_share: locate experts too: those that this share of a category's tokens are routed to.
        lr: learning rate of the full fine-tuning, linear.
        epochs: passes over the data.
        batch: examples in a batch.
        length: tokens of a text.
        warmup: share of the steps.
    """
    share(least=least, expert_share=expert_share)
    how: dict[str, Any] = {"least": least, "within": within, "max_length": length}
    how |= {} if pool is None else {"data": pool}
    return Recipe(
        "sparcom",
        (
            {"do": "neurograft.pipeline.specific.specific", "expert_share": expert_share, **how},
            {
                "do": "tune",
                "max_length": length,
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup),
            },
            {"do": "neurograft.pipeline.specific.altered", **how},
        ),
        paper="sparcom",
    )
