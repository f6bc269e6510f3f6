"""The units that most examples choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import joined, take


@method()
def vote(
    scores: Scores,
    *,
    ballots: Sequence[Scores],
    fraction: float | None = None,
    count: int | None = None,
    per: str = "global",
    lowest: bool = False,
) -> Selection:
    """Let each ballot take its own best units, then take the units chosen most often.

    One outlier among the ballots cannot change the outcome, as it can change a mean. Ties in votes go to the
    better mean score, then to the lower unit number.

    Args:
        scores: mean scores, for ties.
        ballots: scores of single examples or batches, on the same sites.
        fraction: share of each group, for a ballot and for the outcome.
        count: number in each group, instead of a fraction.
        per: the group, as for `top`.
        lowest: choose the lowest scores.
    """
    if not ballots:
        raise RequestError("no ballots", expected="scores of at least one example", do="locate with per_example=True")
    sign = -1.0 if lowest else 1.0
    votes = torch.zeros(len(joined(scores)))
    for ballot in ballots:
        chosen = take(ballot, sign * joined(ballot), fraction=fraction, count=count, per=per, rule={})
        votes += torch.cat([chosen.masks()[name] for name in scores.sites])
    mean = sign * joined(scores)
    rank = torch.empty_like(mean)
    rank[mean.sort(stable=True).indices] = torch.linspace(0.0, 0.5, len(mean))
    return take(scores, votes + rank, fraction=fraction, count=count, per=per, rule={"rule": "vote", "lowest": lowest})
