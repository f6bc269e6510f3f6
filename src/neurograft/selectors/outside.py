"""The units with the highest scores among those that another selection left."""

from __future__ import annotations

from typing import Any

import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import joined, take


@method()
def outside(
    scores: Scores,
    *,
    of: Selection | None = None,
    fraction: float | None = None,
    count: int | None = None,
    per: str = "global",
) -> Selection:
    """Take the highest scores among the units that are not in `of`; ties go to the lower unit number.

    Args:
        scores: a number for every unit.
        of: the units left out; they may name sites that have no scores.
        fraction: share of each group, those left out counted too.
        count: number in each group, instead of a fraction.
        per: the group, as for `top`.

    Raises:
        RequestError: no selection, or too few units outside of it.
    """
    if of is None:
        raise RequestError("no selection to stay outside of", expected="of=", do="pass of=selection, or take 'top'")
    taken = of.masks()
    inside = torch.cat([taken.get(n, torch.zeros(s.n, dtype=torch.bool)) for n, s in scores.sites.items()])
    key = joined(scores).masked_fill(inside, -torch.inf)
    rule: dict[str, Any] = {"rule": "outside", "of": of.digest}
    found = take(scores, key, fraction=fraction, count=count, per=per, rule=rule)
    both = len(found & of)
    if both:
        raise RequestError(
            f"{len(found)} units outside of a selection that leaves {len(found) - both}",
            expected="at most those",
            do="take fewer",
        )
    return found
