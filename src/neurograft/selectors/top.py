"""The units with the highest scores."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import joined, take


@method()
def top(scores: Scores, *, fraction: float | None = None, count: int | None = None, per: str = "global") -> Selection:
    """Take the highest scores, exactly as many as asked for; ties go to the lower unit number.

    Args:
        scores: a number for every unit.
        fraction: share of each group, rounded half up, at least one unit.
        count: number in each group, instead of a fraction.
        per: the group: "global", "layer", "site", or "row" (an output row of a weight, kind "weight" only).

    Raises:
        RequestError: neither or both of fraction and count, or more units than there are.
    """
    return take(scores, joined(scores), fraction=fraction, count=count, per=per, rule={"rule": "top"})
