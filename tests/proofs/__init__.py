"""Proofs: what each paper's mechanism must do, at a size any machine can check, and sabotages that must be noticed.

A proof is a file `test_<slug with _>.py` with

    PAPER = "slug"                   the paper
    SCALE = "tiny"                   "identity" (exact properties), "tiny" (an effect too), "full" (the real thing)
    BROKEN = (broken_a, ...)         one to three context managers that spoil the mechanism; each says how
    def test_...(): ...              no arguments; cheap ones first

and, where worlds are built or trained, a function `prepare()` that builds them before a sabotage can. Tests marked
`@effect` run in `make proofs` only. `note(name=value)` records a number beside the result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
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
