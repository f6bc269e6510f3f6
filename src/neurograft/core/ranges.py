"""Numbers that make no sense, refused before anything is run: name=(value, bound); None passes."""

from __future__ import annotations

from neurograft.core.errors import RequestError

Bound = tuple[float | None, float]


def least(**given: Bound) -> None:
    """Raise if an option lies below the least value it may have.

    Example:
        >>> least(steps=(3, 1), limit=(None, 1))
        >>> least(steps=(0, 1))
        Traceback (most recent call last):
        ...
        neurograft.core.errors.RequestError: got steps=0; expected at least 1; to mend it: raise steps
    """
    for name, (value, low) in given.items():
        if value is not None and not value >= low:
            raise RequestError(f"{name}={value:g}", expected=f"at least {low:g}", do=f"raise {name}")


def above(**given: Bound) -> None:
    """Raise if an option is not above a value.

    Example:
        >>> above(C=(0.0, 0))
        Traceback (most recent call last):
        ...
        neurograft.core.errors.RequestError: got C=0; expected more than 0; to mend it: raise C
    """
    for name, (value, low) in given.items():
        if value is not None and not value > low:
            raise RequestError(f"{name}={value:g}", expected=f"more than {low:g}", do=f"raise {name}")


def share(**given: float | None) -> None:
    """Raise if an option is no share, from 0 to 1.

    Example:
        >>> share(bar=0.9, expert_share=None)
    """
    for name, value in given.items():
        if value is not None and not 0 <= value <= 1:
            raise RequestError(f"{name}={value:g}", expected="a share, from 0 to 1", do=f"give {name} as one")
