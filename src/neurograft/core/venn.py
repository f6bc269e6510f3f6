"""Several selections of one model beside each other: what all share, what each has alone, and chance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from itertools import combinations
from typing import Any

from neurograft.core.errors import RequestError
from neurograft.core.selection import Selection


def general(found: Mapping[str, Selection]) -> Selection:
    """Return the units that every selection holds.

    Raises:
        RequestError: fewer than two selections.
    """
    return reduce(lambda a, b: a & b, _several(found).values())


def unique(found: Mapping[str, Selection]) -> dict[str, Selection]:
    """Return for each selection the units that no other one holds.

    Raises:
        RequestError: fewer than two selections.

    Example:
        >>> from neurograft.core.units import Site
        >>> a, b = (Selection.of({"s": Site("s", "row", 4)}, {"s": ids}) for ids in ([0, 1], [1, 2]))
        >>> {name: left.ids["s"].tolist() for name, left in unique({"a": a, "b": b}).items()}
        {'a': [0], 'b': [2]}
    """
    return {
        name: reduce(lambda a, b: a - b, [other for o, other in found.items() if o != name], mine)
        for name, mine in _several(found).items()
    }


def pairwise(found: Mapping[str, Selection]) -> list[dict[str, Any]]:
    """Return for each pair `first`, `second`, `overlap` |A and B| / min(|A|, |B|), and what `Selection.overlap` gives:
    shared, jaccard, the shared units expected by chance, and the chance of sharing at least so many.

    Raises:
        RequestError: fewer than two selections.
    """
    rows = []
    for (a, first), (b, second) in combinations(_several(found).items(), 2):
        chance = first.overlap(second)
        least = min(len(first), len(second))
        rows.append({"first": a, "second": b, "overlap": chance["shared"] / least if least else 0.0, **chance})
    return rows


def by_layer(found: Selection) -> dict[str, int]:
    """Return how many units are chosen in each layer; "" counts those outside of layers."""
    counts: dict[str, int] = {}
    for name, site in found.sites.items():
        layer = "" if site.layer is None else str(site.layer)
        counts[layer] = counts.get(layer, 0) + len(found.ids[name])
    return counts


def _several(found: Mapping[str, Selection]) -> Mapping[str, Selection]:
    if len(found) < 2:
        raise RequestError(f"{len(found)} selection", expected="at least two to compare", do="give several groups")
    return found
