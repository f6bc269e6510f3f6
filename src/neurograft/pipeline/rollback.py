"""`rollback`: take single edits out of a graft that holds many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neurograft.core.errors import RequestError, near
from neurograft.core.grafts.delta import LowRank
from neurograft.core.grafts.graft import Graft


def rollback(graft: Graft | str | Path, edits: Sequence[int | str] | int | str) -> Graft:
    """Return a graft without some of its edits; all others stay as they are, to the bit.

    Args:
        graft: of `edit` with a method that gives every request numbers of its own (nmke, or locft_bf with
            separate=True), or its folder.
        edits: which to take back: their place on the card, from 0, or their prompt or subject.

    Raises:
        RequestError: an edit whose requests share their numbers, a sum of grafts, no such request, none or all of them.

    Example:
        >>> import neurograft as ng
        >>> from neurograft.worlds.pico import pico
        >>> model = pico("llama")
        >>> asked = [{"prompt": [5, 6, 7], "target_new": [9]}, {"prompt": [8, 5, 6], "target_new": [4]}]
        >>> two = ng.edit(model, asked, by=("nmke", {"mask": "none", "null": None, "steps": 2}), layers=[0])
        >>> [len(g.card["requests"]) for g in (two, ng.rollback(two, [0]))]
        [2, 1]
    """
    whole = graft if isinstance(graft, Graft) else Graft.load(graft)
    asked: list[Mapping[str, Any]] = list(whole.card.get("requests", ()))
    wanted = list(edits) if isinstance(edits, Iterable) and not isinstance(edits, str) else [edits]
    if not wanted:
        raise RequestError("no edit to take back", expected="at least one", do="name its place, prompt or subject")
    dropped = {place for one in wanted for place in _places(one, asked)}
    return part(whole, [i for i in range(len(asked)) if i not in dropped])


def _places(one: int | str, asked: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the places of the requests that a number, a prompt or a subject names."""
    keys = [{str(r[k]) for k in ("prompt", "subject") if r.get(k)} for r in asked]
    found = [i for i, names in enumerate(keys) if isinstance(one, str) and one in names]
    place = _place(one)
    if place is not None and not found:
        if not 0 <= place < len(asked):
            raise RequestError(
                f"request {place} of a graft with {len(asked)}",
                expected="one of its requests, counted from 0" if asked else "a graft of edits",
                do="see the requests on its card",
            )
        return [place]
    if place is not None and place < len(asked) and found != [place]:
        raise RequestError(
            f"{one!r}, the place of one request and the words of another",
            expected="either",
            do="give its prompt, or from Python its place as a number",
        )
    if not found:
        names = sorted({k for here in keys for k in here})
        raise RequestError(
            f"the edit {one!r} of a graft with {len(asked)}",
            expected="a request's prompt or subject, or its place from 0",
            do=near(str(one), names) if names else "count its requests from 0: they hold no text",
        )
    return found


def _place(one: Any) -> int | None:
    """Return a number, or a text of digits, as a number."""
    whole = isinstance(one, int) and not isinstance(one, bool)
    return int(one) if whole or (isinstance(one, str) and one.isdecimal()) else None


def part(graft: Graft, keep: Iterable[int]) -> Graft:
    """Return the graft of some requests of an edit, by their place on its card.

    Args:
        graft: of an edit that gives every request ranks of its own.
        keep: which requests, from 0.

    Raises:
        RequestError: an edit whose requests share their numbers, a sum of grafts, or no such request.
    """
    asked: list[Mapping[str, Any]] = list(graft.card.get("requests", ()))
    if "sum_of" in graft.card:
        raise RequestError(
            "a part of a sum of grafts, whose numbers no longer say which request they belong to",
            expected="the graft of one edit",
            do="take it back in the graft it came with, and add that again",
        )
    chosen = sorted(set(keep))
    ranks: list[int] = list(graft.card.get("ranks", [1] * len(asked)))
    odd = [n for n, d in graft.deltas.items() if not isinstance(d, LowRank) or len(d.A) != sum(ranks)]
    if odd or graft.operations or not asked:
        raise RequestError(
            f"a part of a graft whose requests share {odd[0] if odd else 'its numbers'}",
            expected="an edit with ranks for every request, as nmke gives it",
            do="edit again without the one; by locft_bf with separate=True it could have been taken out",
        )
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(asked):
        raise RequestError(
            f"the requests {chosen[:6]} of a graft with {len(asked)}",
            expected=f"some from 0 to {len(asked) - 1}",
            do="count them from 0, as on the card",
        )
    owner = [i for i, rank in enumerate(ranks) for _ in range(rank)]
    kept = [at for at, i in enumerate(owner) if i in set(chosen)]
    deltas = {
        n: replace(d, A=d.A[kept].clone(), B=d.B[:, kept].clone())
        for n, d in graft.deltas.items()
        if isinstance(d, LowRank)
    }
    measured_then = ("reliability", "rephrase", "locality", "batches", "neurons")
    card = {k: v for k, v in graft.card.items() if k not in measured_then}
    if "ranks" in card:
        card["ranks"] = [ranks[i] for i in chosen]
    return replace(graft, deltas=deltas, originals={}, card={**card, "requests": [asked[i] for i in chosen]})
