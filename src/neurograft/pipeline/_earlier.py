"""What earlier steps of a recipe made, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from neurograft.core.errors import RequestError, near

T = TypeVar("T")


def earlier(state: Mapping[str, Any], names: Sequence[str], kind: type[T]) -> list[T]:
    """Return what steps left under these names.

    Args:
        state: what the recipe has made so far.
        names: of things in it.
        kind: what each must be.

    Raises:
        RequestError: there is nothing of that kind and name.

    Example:
        >>> earlier({"a": 1, "b": "x"}, ["a"], int)
        [1]
    """
    found = []
    for name in names:
        value = state.get(name)
        if not isinstance(value, kind):
            raise RequestError(
                f"the {kind.__name__.lower()} {name!r} of a recipe that made none",
                expected="an earlier step's name",
                do=near(name, [k for k, v in state.items() if isinstance(v, kind)]),
            )
        found.append(value)
    return found
