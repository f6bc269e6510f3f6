"""TaRot: turn attention heads by angles found on a few examples, with forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import unscored

UNITS = {"head": None, "layer": "ffn"}


@method(
    paper="tarot",
    kinds={"head", "layer"},
    task="text-generation",
    departs="As the edit `tarot` says. The solved examples come from other rows of the same data; they are shown as "
    "text before the prompt, or as turns before the last where the rows are messages, in the tokenizer's own chat "
    "template. Answers are scored by their first token. Generation tasks, whose metric is a reward of generated text, "
    "are not here.",
)
def tarot(
    *,
    form: str = "rotary",
    units: str = "head",
    depth: float = 0.5,
    bound: float = math.pi / 4,
    metric: str = "probability",
    shots: Sequence[int] = (0, 2, 4, 6),
    size: int = 20,
    optimizer: str = "bayes",
    starts: int = 4,
    iterations: int = 120,
    origin: bool = True,
    ship: str = "operations",
) -> Recipe:
    """Rotate what the heads of the lower blocks say, x' = x @ R(theta), to make the right answers likelier.

    Args:
        form: "rotary" (w / 2 angles a head of w features), "givens" (w - 1) or "scale" (one factor).
        units: "head", or "layer" for the FFN's outputs.
        depth: share of the blocks, from the lowest; half of Llama-3 in the paper, less than a fifth of Phi-3.
        bound: largest angle, radians: pi / 4 or pi / 6.
        metric: "probability", "accuracy", "logit" or "rank" of the answer's first token.
        shots: how many solved rows may stand before a prompt; [0] for data that are no text.
        size: examples: 20 or 10 in the paper.
        optimizer: "bayes" or "random".
        starts: random points to begin with.
        iterations: points proposed after them.
        origin: try the unchanged model first.
        ship: "operations", the angles, or "weights", folded into the output projections.
    """
    at = UNITS[one_of(units, UNITS, what="unit")]
    options = {"form": form, "bound": bound, "metric": metric, "optimizer": optimizer, "starts": starts}
    options |= {"iterations": iterations, "origin": origin, "ship": ship}
    return Recipe(
        "tarot",
        (
            unscored(units, at=at, data=None, scores="order"),
            {"do": "select", "scores": "$order", "by": "depth", "stop": depth},
            {"do": "neurograft.pipeline.few_shot", "shots": list(shots), "size": size},
            {"do": "edit", "requests": "$shown", "where": "$where", "by": ("tarot", options)},
        ),
        paper="tarot",
    )
