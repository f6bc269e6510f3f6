"""Steps that take units by their kind and place alone, without scoring them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unscored(
    units: str, within: Mapping[str, Any] | None = None, *, scores: str | None = None, **step: Any
) -> dict[str, Any]:
    """Return the step that gives every unit a random number, for selectors that look at names and places.

    Args:
        units: kind of unit.
        within: options of `locators.within`, such as roles, which leave some sites out; None for all.
        scores: what the numbers are called afterwards, where the usual name is taken.
        **step: more arguments of `locate`.

    Example:
        >>> unscored("column", {"roles": ["q", "v"]})
        {'do': 'locate', 'by': ('within', {'by': 'noise', 'roles': ['q', 'v']}), 'units': 'column'}
    """
    by = "noise" if within is None else ("within", {"by": "noise", **within})
    found = {"do": "locate", "by": by, "units": units, **step}
    return found if scores is None else {**found, "as": scores}


def everything(
    units: str,
    within: Mapping[str, Any] | None = None,
    *,
    scores: str | None = None,
    name: str | None = None,
    **step: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two steps that select all units of a kind; arguments as for `unscored`, and the selection's name.

    Example:
        >>> everything("module", {"roles": "head"}, name="head")[1]
        {'do': 'select', 'by': 'top', 'fraction': 1.0, 'as': 'head'}
    """
    take: dict[str, Any] = {"do": "select", "by": "top", "fraction": 1.0}
    take |= {} if scores is None else {"scores": f"${scores}"}
    take |= {} if name is None else {"as": name}
    return unscored(units, within, scores=scores, **step), take
