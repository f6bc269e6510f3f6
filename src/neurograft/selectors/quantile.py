"""The units at or above a quantile of the scores."""

from __future__ import annotations

import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import groups, joined, split


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
    key, group = joined(scores), groups(scores, per)
    order = key.sort(stable=True).indices
    order = order[group[order].sort(stable=True).indices]  # by group, then from the lowest
    sizes = torch.bincount(group)
    place = torch.minimum((q * sizes.double()).long(), (sizes - 1).clamp(min=0)) + sizes.cumsum(0) - sizes
    chosen = key >= key[order[place.clamp(max=len(key) - 1)]][group]
    return split(scores, chosen.nonzero().reshape(-1), {"rule": "quantile", "q": q, "per": per})
