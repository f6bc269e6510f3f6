"""A step of recipes: several selections become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from neurograft.core.selection import Selection
from neurograft.pipeline._earlier import earlier


def joined(state: Mapping[str, Any], *, of: Sequence[str], name: str = "where") -> dict[str, Selection]:
    """Return the union of selections that earlier steps made, under a name.

    Args:
        state: what the recipe has made so far.
        of: names of selections in it.
        name: of the union.

    Raises:
        RequestError: there is no selection of that name.
    """
    return {name: reduce(lambda a, b: a | b, earlier(state, of, Selection))}
