"""Whose code a name may stand for: what a recipe file names is neurograft's own, unless it is trusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from neurograft.core.errors import RequestError

# None: somebody's own words, which may name anything. Otherwise the names, and packages, that are trusted.
_TRUSTED: ContextVar[frozenset[str] | None] = ContextVar("neurograft_trusted", default=None)


@contextmanager
def trusting(names: Iterable[str]) -> Iterator[None]:
    """Let names of methods stand for nothing, within the block, but neurograft's own methods and what is listed.

    Args:
        names: dotted names, or packages all of whose names are trusted.

    Example:
        >>> with trusting(["mypackage"]):
        ...     check("mypackage.losses.mine", ("neurograft.objectives",))
        ...     check("os.system", ("neurograft.objectives",))
        Traceback (most recent call last):
        neurograft.core.errors.RequestError: got the name 'os.system' in a recipe file; \
expected a method of neurograft, for a file is data that anybody may have written; \
to mend it: if you know that code and want it run: trust='os'
    """
    token = _TRUSTED.set(frozenset(names))
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def check(dotted: str, homes: Iterable[str], found: Any = None) -> None:
    """Raise if a name may not stand for what it does.

    Args:
        dotted: the name.
        homes: the packages of neurograft whose public names are methods.
        found: what it stands for, once that is known: it has to be at home there, not only imported.

    Raises:
        RequestError: the name stands in a recipe file, is none of neurograft's methods, and is not trusted.
    """
    trusted = _TRUSTED.get()
    if trusted is None or any(dotted == name or dotted.startswith(f"{name}.") for name in trusted):
        return
    names = [dotted] if found is None else [dotted, f"{getattr(found, '__module__', '')}.{dotted.rpartition('.')[2]}"]
    if all(name.startswith(tuple(f"{home}." for home in homes)) and "._" not in name for name in names):
        return
    raise RequestError(
        f"the name {dotted!r} in a recipe file",
        expected="a method of neurograft, for a file is data that anybody may have written",
        do=f"if you know that code and want it run: trust={dotted.partition('.')[0]!r}",
    )
