"""The units that most examples choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.selectors._quota import joined, take


@method()
def vote(
    scores: Scores,
    *,
    ballots: Sequence[Scores] = (),
    fraction: float | None = None,
    count: int | None = None,
    per: str = "global",
    lowest: bool = False,
    absolute: bool = False,
) -> Selection:
    """Let each ballot take its own best units, then take the units chosen most often.

    One outlier among the ballots cannot change the outcome, as it can change a mean. Ties in votes go to the
    better mean score, then to the lower unit number.

    Args:
        scores: mean scores, for ties, and those of each example, if the locator kept them (`per_example=True`).
        ballots: scores of single examples or batches on the same sites, instead of these.
        fraction: share of each group, for a ballot and for the outcome.
        count: number in each group, instead of a fraction.
        per: the group, as for `top`.
        lowest: choose the lowest scores.
        absolute: by absolute values; otherwise strongly negative units count as low.

    Raises:
        RequestError: no ballots, or a wrong quota.

    Example:
        >>> from neurograft.core.units import Site
        >>> site, each = {"a": Site("a", "row", 3)}, torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.0, 0.0, 99.0]])
        >>> vote(Scores(site, {"a": each.mean(0)}, {}, {"a": each}), count=1).ids["a"].tolist()
        [1]
    """
    if not ballots:
        ballots = _kept(scores)
    sign = -1.0 if lowest else 1.0

    def worth(of: Scores) -> Tensor:
        values = joined(of)
        return sign * (values.abs() if absolute else values)

    votes = torch.zeros(len(joined(scores)), dtype=torch.float64)
    for ballot in ballots:
        chosen = take(ballot, worth(ballot), fraction=fraction, count=count, per=per, rule={})
        votes += torch.cat([chosen.masks()[name] for name in scores.sites])
    # Less than a vote, and in float64, so that it decides ties and nothing else, however many units there are.
    rank = torch.empty_like(votes)
    rank[worth(scores).sort(descending=True, stable=True).indices] = torch.linspace(
        0.5, 0.0, len(votes), dtype=torch.float64
    )
    rule = {"rule": "vote", "lowest": lowest, "absolute": absolute, "ballots": len(ballots)}
    return take(scores, votes + rank, fraction=fraction, count=count, per=per, rule=rule)


def _kept(scores: Scores) -> list[Scores]:
    if not scores.per_example:
        raise RequestError(
            "no ballots",
            expected="scores of at least one example",
            do="locate with per_example=True, e.g. by=('kva', {'per_example': True})",
        )
    count = len(next(iter(scores.per_example.values())))
    return [Scores(scores.sites, {n: v[i] for n, v in scores.per_example.items()}) for i in range(count)]
