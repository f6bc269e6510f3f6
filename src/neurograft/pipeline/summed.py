"""A step of recipes: several grafts become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from neurograft.core.errors import RequestError, near
from neurograft.core.graft import Graft


def summed(state: Mapping[str, Any], *, of: Sequence[str], name: str = "graft") -> dict[str, Graft]:
    """Return the sum of grafts that earlier steps made, under a name, with the card of the last.

    Args:
        state: what the recipe has made so far.
        of: names of grafts in it.
        name: of the sum.

    Raises:
        RequestError: there is no graft of that name.
    """
    for one in of:
        if not isinstance(state.get(one), Graft):
            raise RequestError(
                f"the graft {one!r} of a recipe that made none", expected="an earlier step's name",
                do=near(one, [k for k, v in state.items() if isinstance(v, Graft)]),
            )  # fmt: skip
    found = reduce(lambda a, b: a + b, [state[one].bind(state["model"]) for one in of])
    return {name: replace(found, card={**state[of[-1]].card, "sum_of": [state[one].identity for one in of]})}
