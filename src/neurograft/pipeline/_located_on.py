"""What a selection's card tells of its making: the examples it was located on, and how to locate it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from neurograft.core.choose import choose
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.prompts.examples import row_digests, singles
from neurograft.core.selection import Selection
from neurograft.core.trust import trusting
from neurograft.pipeline.locate import locate
from neurograft.pipeline.select import select


def located_on(where: Selection) -> frozenset[str]:
    """Return the digests of the examples a selection was located on, as far as its card tells."""
    found: list[str] = []
    pending: list[Any] = [where.card]
    while pending:
        card = pending.pop()
        if isinstance(card, Mapping):
            found += [d for d in card.get("examples") or () if isinstance(d, str)]
            pending += [v for k, v in card.items() if k != "examples"]
        elif isinstance(card, (list, tuple)):
            pending += card
    return frozenset(found)


def unseen(
    batches: list[Batch], where: Selection, overlap: str, limit: int | None
) -> tuple[list[Batch], int, bool | None]:
    """Leave out of the data what a selection was located on.

    Args:
        batches: examples.
        where: the selection.
        overlap: "refuse" such examples, or "drop" them.
        limit: how many to keep at most.

    Returns:
        The examples kept, how many were dropped, and whether they are known to be others (None: the card is silent).

    Raises:
        RequestError: there are some, and they are refused.
    """
    used = located_on(where)
    kept: list[Batch] = []
    count, dropped = 0, 0
    for batch in batches:
        rows, digests = list(singles(batch)), row_digests([batch])
        seen = [d in used for d in digests]
        dropped += sum(seen)
        left = len(rows) if limit is None else limit - count
        if not any(seen) and len(rows) <= left:
            kept.append(batch)
            count += len(rows)
            continue
        for row, known in zip(rows, seen):
            if not known and (limit is None or count < limit):
                kept.append(row)
                count += 1
    if dropped and overlap == "refuse":
        raise RequestError(
            f"{dropped} examples on which this selection was located",
            expected="other examples",
            do="hold some data out for evidence, or pass overlap='drop' to leave these out",
        )
    return kept, dropped, True if used else None


def relocated(model: nn.Module, where: Selection) -> Callable[[Sequence[Batch]], Selection]:
    """Return the way a selection was made, by its card, for other batches.

    Raises:
        RequestError: the card does not tell, or the rule needs more than scores.
    """
    card: Mapping[str, Any] = where.card
    located: Mapping[str, Any] = card.get("located") or {}
    known = {"units", "at", "objective", "positions", "seed"} & located.keys()
    if card.get("rule") not in ("top", "bottom") or "by" not in located or located.get("contrast"):
        raise RequestError(
            f"stability of a selection made by {card.get('rule') or 'hand'}",
            expected="one that ng.locate and the selectors top or bottom made, on one set of data",
            do="pass relocate=callable (batches) -> selection",
        )
    try:
        with trusting([]):  # a card is data that anybody may have written
            choose("locators", located["by"])
    except RequestError as error:
        raise RequestError(
            f"stability of a selection whose card says that it was located so: {error.came}",
            expected="a locator of neurograft",
            do="pass relocate=callable (batches) -> selection",
        ) from error
    how = {k: located[k] for k in known if located[k] is not None}
    rule = {k: card[k] for k in ("fraction", "count", "per") if card.get(k) is not None}

    def again(batches: Sequence[Batch]) -> Selection:
        with trusting([]):
            scores = locate(model, list(batches), by=located["by"], **how)
            return select(scores, card["rule"], **rule)

    return again
