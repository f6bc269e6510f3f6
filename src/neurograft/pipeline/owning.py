"""A step of recipes: from units of one kind to the units of another that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.anatomy.convert import convert
from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError, near
from neurograft.core.selection import Selection


def owning(
    state: Mapping[str, Any], *, of: str = "where", units: str = "neuron", name: str = "where"
) -> dict[str, Selection]:
    """Return the units that own a number of an earlier step's selection, under a name.

    Args:
        state: what the recipe has made so far.
        of: name of the selection, such as rows of gate and up projections.
        units: kind of the owners, such as the neurons these rows belong to.
        name: of what is returned.

    Raises:
        RequestError: there is no such selection, or no unit owns any of it.
    """
    found = state.get(of)
    if not isinstance(found, Selection):
        raise RequestError(
            f"the selection {of!r} of a recipe that made none",
            expected="an earlier step's name",
            do=near(of, [k for k, v in state.items() if isinstance(v, Selection)]),
        )
    return {name: convert(found, sites(state["model"], units), whole=False)}
