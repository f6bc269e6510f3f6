"""How few units carry an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._changes import evaluating
from neurograft.audits._scoring import scored
from neurograft.audits._silence import drawn, silenced
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection


@method(
    paper="neurostrike",
    needs={"batches", "labels"},
    departs="The paper reports attack success at one fixed set of units. Here the smallest set is sought that changes "
    "the labelled answers, beside random sets of as many units at each site; a behaviour that few units carry is one "
    "that a little tuning or damage can lose.",
)
def concentration(
    model: nn.Module,
    scores: Scores,
    batches: Sequence[Batch],
    *,
    flipped: float = 0.95,
    most: float = 0.5,
    count: int | None = None,
    controls: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Find the smallest number of best-scored units whose silence changes `flipped` of the labelled answers.

    Only examples that the whole model answers as labelled count: its likeliest token is the label at every labelled
    place. Counts double until enough answers change, then the gap is halved. Scores of a base say how its units
    transfer: give them with the model that was tuned from it.

    Args:
        model: left as found.
        scores: which units go first.
        batches: examples of the guarded behaviour, their labels the answers that should stay.
        flipped: share of the answers that must change.
        most: share of the units up to which is searched.
        count: silence so many instead of searching.
        controls: random selections of the same counts at each site, of other units where there are enough.
        seed: names them.

    Returns:
        `units` (None if `most` of them do not suffice), `of`, `fraction`, `answered` (share of the examples that
        count), `kept` at `units`, `random` (kept under each control), `curve` of units and kept.

    Raises:
        RequestError: no example is answered as labelled, or nothing to silence.
    """
    if not batches:
        raise RequestError("no batches", expected="labelled examples of the behaviour", do="give data")
    base = _answered(model, batches)
    if not bool(base.any()):
        raise RequestError(
            f"{len(base)} examples, none of which the model answers as labelled",
            expected="examples whose labels are the model's own answers",
            do="label them with what the model says, such as its refusal",
        )
    total = sum(site.n for site in scores.sites.values())
    curve: dict[int, float] = {}

    def kept(where: Selection) -> float:
        with silenced(model, where):
            return float((_answered(model, batches) & base).sum() / base.sum())

    def at(units: int) -> float:
        if units not in curve:
            curve[units] = kept(scores.top(count=units))
        return curve[units]

    found = count if count is not None else _smallest(at, 1 - flipped, max(1, int(most * total)))
    random: list[float] = []
    if found is not None:
        at(found)
        random = [kept(drawn(scores.top(count=found), seed + i)) for i in range(controls)]
    return {
        "units": found,
        "of": total,
        "fraction": None if found is None else found / total,
        "answered": float(base.float().mean()),
        "kept": None if found is None else curve[found],
        "random": random,
        "curve": [{"units": k, "kept": v} for k, v in sorted(curve.items())],
    }


def _smallest(at: Any, bar: float, most: int) -> int | None:
    low, high = 0, 1
    while at(high) > bar:
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= bar else (middle, high)
    return high


def _answered(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return for each example whether the likeliest class is the label at every labelled place, bool [N]."""
    found = []
    with evaluating(model):
        for batch in batches:
            read = scored(model, batch)
            found.append((read.by_row(read.right) == read.counts) & (read.counts > 0))
    return torch.cat(found)
