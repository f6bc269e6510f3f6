"""Bi-directional bias attribution: the channels a preference among groups comes from, pinned to a constant."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.core.ranges import above, least
from neurograft.pipeline.recipe import Recipe


@method(
    paper="bidirectional-bias",
    kinds={"norm", "channel"},
    task="text-generation",
    departs="Attribution and pin meet at one place, what the head reads; the reference attributes that state but pins "
    "the last block's output, before the final norm (site='residual' attributes and pins there). beta and C are given, "
    "not searched: measure settings with `audits.stereotype` on half of the data. Which words are cues is the user's "
    "data; `audits.stereotype` tells each prompt's entropy over the groups, the paper's ranking of cues.",
)
def bidirectional_bias(
    *,
    direction: str = "forward",
    candidates: tuple[str | int, ...] = (),
    beta: float = 0.1,
    C: float = 0.0,
    site: str = "head",
    variants: int = 2,
    temperature: float = 0.1,
    steps: int = 20,
    rule: str = "midpoint",
    limit: int | None = 256,
) -> Recipe:
    """Attribute the preference among candidate words to the head's input channels and pin the highest ones.

    FIG_j = h_j * mean over the path of dF(alpha h)/dh_j with F = 1 / H(p) (forward), or F the Jensen-Shannon
    divergence between the variants of a prompt (backward). No training and no change of prompts; the graft is an
    operation, since a pinned residual channel is no weight of a bias-free model.

    Args:
        direction: "forward", cue to group, or "backward", group to word.
        candidates: the groups' words (forward) or the options (backward); empty for the answers in the data, rows of
            prompt and completion, one for each candidate.
        beta: share of the channels that is pinned; the paper tries .1 to .4.
        C: what they are pinned to; the paper tries -2 to 2.
        site: "head", the final norm's output, or "residual", the last block's.
        variants: rows of a prompt that stand together, for "backward".
        temperature: of the backward distributions.
        steps: points on the path.
        rule: "midpoint", or "inclusive" as published.
        limit: examples.
    """
    least(variants=(variants, 1), steps=(steps, 1))
    above(temperature=(temperature, 0))
    options: dict[str, Any] = {"candidates": list(candidates), "direction": direction, "variants": variants}
    options |= {"temperature": temperature, "steps": steps, "rule": rule, "last": True}
    units: dict[str, Any] = {"units": "norm"}
    if one_of(site, ("head", "residual"), what="site") == "residual":
        units = {"units": "channel", "at": "residual"}
    return Recipe(
        "bidirectional_bias",
        (
            {"do": "locate", "by": ("cue_bias", options), **units, "limit": limit, "batch_size": 4 * variants},
            {"do": "select", "by": "top", "fraction": beta},
            {"do": "intervene", "kind": "pin", "value": C},
        ),
        paper="bidirectional-bias",
    )
