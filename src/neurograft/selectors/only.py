"""Units taken by another selector, with a part of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from neurograft.core.card import method
from neurograft.core.choose import choose
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection


@method()
def only(
    scores: Scores,
    *,
    fraction: float | None = None,
    count: int | None = None,
    per: str = "global",
    by: Any = "top",
    parts: str | Sequence[int] = "all",
) -> Selection:
    """Take units by another selector, and of each only the numbers it writes or reads with.

    Args:
        scores: a number for every unit.
        fraction: for the other selector.
        count: for the other selector.
        per: for the other selector.
        by: the other selector.
        parts: "writes" (a neuron's column of down, a head's columns of the output projection), "reads" (the rest),
            "all", or positions in the site's parts.

    Raises:
        RequestError: units without such parts.
    """
    chosen: Selection = choose("selectors", by)(scores, fraction=fraction, count=count, per=per)
    if parts == "all":
        return chosen
    sites = {}
    for name, site in chosen.sites.items():
        rest = tuple(i for i in range(len(site.parts)) if i not in site.writes)
        keep = {"writes": site.writes, "reads": rest}.get(parts, ()) if isinstance(parts, str) else tuple(parts)
        if not keep:
            raise RequestError(
                f"parts={parts!r} at {name!r}",
                expected="'writes' or 'reads' of units that have both (neurons, heads), 'all', or positions",
                do="choose another kind of unit, or parts='all'",
            )
        sites[name] = site.with_parts(*keep)
    rule = {**chosen.card, "parts": parts if isinstance(parts, str) else list(parts)}
    return replace(chosen, sites=sites, card=rule)
