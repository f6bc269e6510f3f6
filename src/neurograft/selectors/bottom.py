"""The units with the lowest scores."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import joined, take


@method()
def bottom(
    scores: Scores, *, fraction: float | None = None, count: int | None = None, per: str = "global"
) -> Selection:
    """Take the lowest scores, exactly as many as asked for; ties go to the lower unit number.

    Args:
        scores: a number for every unit.
        fraction: share of each group.
        count: number in each group, instead of a fraction.
        per: the group, as for `top`.
    """
    return take(scores, -joined(scores), fraction=fraction, count=count, per=per, rule={"rule": "bottom"})
