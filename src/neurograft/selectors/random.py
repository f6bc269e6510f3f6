"""Units drawn at random, the control of every other selector."""

from __future__ import annotations

import torch

from neurograft.core.card import method
from neurograft.core.seeds import generator
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import joined, take


@method()
def random(
    scores: Scores, *, fraction: float | None = None, count: int | None = None, per: str = "global", seed: int = 0
) -> Selection:
    """Draw units without regard to their scores.

    Args:
        scores: give the sites.
        fraction: share of each group.
        count: number in each group, instead of a fraction.
        per: the group, as for `top`.
        seed: names the draw.
    """
    key = torch.rand(len(joined(scores)), generator=generator(seed, "selectors.random"))
    return take(scores, key, fraction=fraction, count=count, per=per, rule={"rule": "random", "seed": seed})
