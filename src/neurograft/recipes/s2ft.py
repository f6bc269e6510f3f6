"""S2FT: a few FFN channels, drawn over all layers, train the numbers they write with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

# The paper's five selections by their letters.
SCORES: Mapping[str, Any] = {
    "R": "noise",
    "W": "magnitude",
    "A": "activation",
    "S": ("product", {"of": ["magnitude", "activation"]}),
    "G": ("gradient", {"score": "l2"}),
}


@method(
    paper="s2ft",
    kinds={"neuron", "head"},
    task="text-generation",
    departs="No permutation of the weights: the chosen columns are gathered, so that base and graft stay in the base's "
    "coordinates (the two train alike, see the proof). Heads count as attention heads, of which only columns of the "
    "output projection are trained; the reference cuts queries, keys and values by key/value heads and outputs by "
    "attention heads, which is safe only where both agree. G is the norm of the accumulated gradient of the unit's "
    "weights; the paper's code was not read on that. Warm-up is a share of the steps (the paper: 100 steps of about "
    "8,000); batches of 16 instead of 64.",
)
def s2ft(
    *,
    fraction: float = 0.03,
    heads: float = 0.0,
    score: str = "R",
    smallest: bool = False,
    per: str = "global",
    parts: str = "writes",
    limit: int | None = 256,
    lr: float = 2e-4,
    epochs: float = 3.0,
    batch: int = 16,
    warmup: float = 0.0125,
) -> Recipe:
    """Select channels sparsely over all layers, compute densely: train columns of `down_proj` (and of `o_proj`).

    Args:
        fraction: share of all FFN channels (Llama-3: 0.03; Llama-2: 0.02 with heads=0.052).
        heads: share of all attention heads whose output columns are trained too.
        score: how units are chosen: R at random, W norm of their weights, A activation, S product of both, G gradient.
        smallest: take the lowest scores; A with small activations is reported to help, large ones to hurt.
        per: the quota: "global" draws over layers jointly, so that layers get different counts.
        parts: "writes", or "reads" for rows of up and gate, or "all".
        limit: examples for A, S and G.
        lr: learning rate, linear with warm-up; 1e-3 for arithmetic in the paper.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    by = SCORES[one_of(score, SCORES, what="score")]
    take = ("only", {"by": "bottom" if smallest else "top", "parts": parts})
    units = [("neuron", fraction)] + ([("head", heads)] if heads else [])
    steps: list[dict[str, Any]] = []
    for kind, share in units:
        steps.append({"do": "locate", "by": by, "units": kind, "limit": limit})
        steps.append({"do": "select", "by": take, "fraction": share, "per": per, "as": kind if heads else "where"})
    if heads:
        steps.append({"do": "neurograft.pipeline.joined", "of": ["neuron", "head"]})
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup)
    return Recipe("s2ft", (*steps, {"do": "tune", "adapter": "slice", "args": args}), paper="s2ft")
