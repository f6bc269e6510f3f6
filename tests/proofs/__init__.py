"""Proofs: what each paper's mechanism must do, at a size any machine can check, and sabotages that must be noticed.

A proof is a file `test_<slug with _>.py` with

    PAPER = "slug"                   the paper
    SCALE = "tiny"                   "identity" (exact properties), "tiny" (an effect too), "full" (the real thing)
    BROKEN = (broken_a, ...)         one to three context managers that spoil the mechanism; each says how
    def test_...(): ...              no arguments; cheap ones first

and, where worlds are built or trained, a function `prepare()` that builds them before a sabotage can. Tests marked
`@effect` run in `make proofs` only. `note(name=value)` records a number beside the result, and
`bar("what", reached, at_least=...)` holds numbers against a bar the paper's card names. Bars are never moved: one that
is not reached is declared with `missed=True`, the page shows asked and reached, and the scale is then "identity".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_NOTES: ContextVar[dict[str, Any] | None] = ContextVar("notes", default=None)


def effect(test: F) -> F:
    """Mark a test that takes long: it runs in `make proofs`, not in `make test`."""
    test.effect = True  # type: ignore[attr-defined]
    return test


def note(**numbers: float | str | list[float]) -> None:
    """Record what was measured, for the record and the docs; does nothing outside of a recorded run."""
    notes = _NOTES.get()
    if notes is not None:
        notes.update(numbers)


def bar(
    what: str,
    reached: float | Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    missed: bool = False,
) -> None:
    """Hold a number, or the mean over seeds, against a bar of the card, and record both.

    Args:
        what: what was measured, in words.
        reached: the number, or one a seed.
        at_least: the lowest that will do.
        at_most: the highest that will do.
        missed: the bar is known not to be reached here, or only on some machines; asked and reached are reported.

    Raises:
        AssertionError: it is not reached, and `missed` does not say so.
    """
    values = [float(v) for v in reached] if isinstance(reached, Sequence) else [float(reached)]
    mean = sum(values) / len(values)
    asked = " and ".join(f"{sign} {limit:g}" for sign, limit in (("≥", at_least), ("≤", at_most)) if limit is not None)
    assert asked, "a bar has a height"
    met = (at_least is None or mean >= at_least) and (at_most is None or mean <= at_most)
    notes = _NOTES.get()
    if notes is not None:
        notes.setdefault("bars", {})[what] = {"asked": asked, "reached": values, "met": met}
    assert met or missed, f"{what}: asked {asked}, reached {mean:.4g} ({', '.join(f'{v:.4g}' for v in values)})"


@contextmanager
def noting() -> Iterator[dict[str, Any]]:
    """Collect the notes of a block."""
    found: dict[str, Any] = {}
    token = _NOTES.set(found)
    try:
        yield found
    finally:
        _NOTES.reset(token)


@contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute that must exist, of an object or of a module given by name, for the length of a block."""
    owner = importlib.import_module(owner) if isinstance(owner, str) else owner
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
