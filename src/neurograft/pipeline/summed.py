"""A step of recipes: several grafts become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from neurograft.core.grafts.graft import Graft
from neurograft.pipeline._earlier import earlier


def summed(state: Mapping[str, Any], *, of: Sequence[str], name: str = "graft") -> dict[str, Graft]:
    """Return the sum of grafts that earlier steps made, under a name, with the card of the last.

    Args:
        state: what the recipe has made so far.
        of: names of grafts in it.
        name: of the sum.

    Raises:
        RequestError: there is no graft of that name.
    """
    grafts = earlier(state, of, Graft)
    found = reduce(lambda a, b: a + b, [graft.bind(state["model"]) for graft in grafts])
    return {name: replace(found, card={**grafts[-1].card, "sum_of": [graft.identity for graft in grafts]})}
