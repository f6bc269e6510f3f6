"""LoKI: write the new task into the FFN's output rows that general answers need least."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.ranges import least
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="loki",
    kinds={"row"},
    task="text-generation",
    departs="Attribution as `locators.kva` says: from zero activations, multiplied with them, for the data's answers. "
    "Shares of rows are rounded half up, not down; ties in votes go to the lower mean score, where the "
    "reference's order is arbitrary. The learning rate is the one in the authors' files; they lower it as q rises "
    "(0.4 times at q = 30 of what it is at q = 10), which is left to the user.",
)
def loki(
    *,
    general: str | None = None,
    q: float = 10.0,
    absolute: bool = False,
    rank: int | None = None,
    steps: int = 7,
    rule: str = "right",
    baseline: str = "zero",
    everywhere: bool = False,
    multiply: bool = True,
    answer: str = "labelled",
    limit: int | None = 256,
    lr: float = 1e-5,
    epochs: float = 3.0,
    batch: int = 4,
    warmup: float = 0.1,
) -> Recipe:
    """Attribute general answers to the output rows of each `down_proj`, and train only those that matter least.

    Each example votes for the q % of every layer's rows with the smallest (signed) attribution; the rows with most
    votes are trained, as many in each layer, with their biases.

    Args:
        general: file of general questions with short answers, prompt/completion, to attribute; None for the tuning
            data's own rows, which protects what the model answers there.
        q: percentage of each layer's rows that is trained; 5 to 30 in the paper.
        absolute: vote by absolute attribution; signed, strongly negative rows count as unneeded.
        rank: train a LoRA of this rank inside the chosen rows instead of the rows themselves; 32 in the paper.
        steps: points of the integral, see `locators.kva`.
        rule: its quadrature.
        baseline: where its path begins.
        everywhere: see `locators.kva`.
        multiply: see `locators.kva`; False is the printed formula.
        answer: "labelled" or "likeliest".
        limit: examples that vote.
        lr: learning rate, cosine with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    least(steps=(steps, 1), rank=(rank, 1))
    source: dict[str, Any] = {} if general is None else {"data": general}
    options = {"steps": steps, "rule": rule, "baseline": baseline, "everywhere": everywhere, "multiply": multiply}
    options |= {"answer": answer, "per_example": True}
    by = ("within", {"by": ("kva", options), "roles": "down"})
    chosen = ("vote", {"lowest": True, "absolute": absolute})
    return Recipe(
        "loki",
        (
            {"do": "locate", "by": by, "units": "row", "limit": limit, **source},
            {"do": "select", "by": chosen, "fraction": q / 100, "per": "layer"},
            {
                "do": "tune",
                "adapter": "slice" if rank is None else ("slice_lora", {"rank": rank}),
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine"),
            },
        ),
        paper="loki",
    )
