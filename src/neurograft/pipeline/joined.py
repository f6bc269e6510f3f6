"""A step of recipes: several selections become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from neurograft.core.errors import RequestError, near
from neurograft.core.selection import Selection


def joined(state: Mapping[str, Any], *, of: Sequence[str], name: str = "where") -> dict[str, Selection]:
    """Return the union of selections that earlier steps made, under a name.

    Args:
        state: what the recipe has made so far.
        of: names of selections in it.
        name: of the union.

    Raises:
        RequestError: there is no selection of that name.
    """
    for one in of:
        if not isinstance(state.get(one), Selection):
            raise RequestError(
                f"the selection {one!r} of a recipe that made none", expected="an earlier step's name",
                do=near(one, [k for k, v in state.items() if isinstance(v, Selection)]),
            )  # fmt: skip
    return {name: reduce(lambda a, b: a | b, [state[one] for one in of])}
