"""The units at or above a quantile of the scores."""

from __future__ import annotations

import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import groups, joined, ranked, split


@method()
def quantile(scores: Scores, *, q: float, per: str = "global") -> Selection:
    """Take every unit whose score is at least the q-quantile of its group; ties all pass, unlike in `top`.

    Args:
        scores: a number for every unit.
        q: between 0 and 1; 0.95 keeps about the highest twentieth.
        per: the group, as for `top`.
    """
    if not 0 <= q < 1:
        raise RequestError(f"q={q}", expected="at least 0, below 1", do="give q=0.95")
    key = joined(scores)
    chosen = torch.zeros(len(key), dtype=torch.bool)
    for group in groups(scores, per):
        mine = group.read(key)
        if mine.numel():
            place = min(int(q * mine.shape[1]), mine.shape[1] - 1)
            group.write_(chosen, mine >= ranked(mine, place))
    return split(scores, chosen.nonzero().reshape(-1), {"rule": "quantile", "q": q, "per": per})
