"""Numbers that make no sense, refused before anything is run."""

from __future__ import annotations

from neurograft.core.errors import RequestError


def least(**given: tuple[float, float]) -> None:
    """Raise if an option lies below the least value it may have: name=(value, least).

    Example:
        >>> least(steps=(3, 1), lr=(0.1, 0))
        >>> least(steps=(0, 1))
        Traceback (most recent call last):
        ...
        neurograft.core.errors.RequestError: got steps=0; expected at least 1; to mend it: raise steps
    """
    for name, (value, low) in given.items():
        if not value >= low:
            raise RequestError(f"{name}={value:g}", expected=f"at least {low:g}", do=f"raise {name}")
