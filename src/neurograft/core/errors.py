"""Errors that say what came, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

CALLED_AS = "neurograft called "  # how a note begins on an error that came out of somebody's own callable


class RequestError(ValueError):
    """A request that cannot be served as it stands; the command line exits with status 2.

    Args:
        came: what was given, in the caller's words.
        expected: what would have been understood.
        do: the next step that mends it.

    Example:
        >>> str(RequestError("unit kind 'neurn'", expected="neuron or head", do="units='neuron'"))
        "got unit kind 'neurn'; expected neuron or head; to mend it: units='neuron'"
    """

    def __init__(self, came: str, *, expected: str, do: str) -> None:
        self.came, self.expected, self.do = came, expected, do
        super().__init__(f"got {came}; expected {expected}; to mend it: {do}")


class RunError(RuntimeError):
    """A run that failed although the request was understood; the command line exits with status 1."""


def near(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Say which known names resemble `name`, or list some of them.

    Example:
        >>> near("neurn", ["neuron", "head"])
        "did you mean 'neuron'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"choose one of {shown}" if names else "none is available here"


def one_of(name: str, known: Iterable[str], *, what: str) -> str:
    """Return `name` if it is known, else raise with the near matches.

    Raises:
        RequestError: `name` is not among `known`.

    Example:
        >>> one_of("top", ["top", "bottom"], what="selector")
        'top'
    """
    names = sorted(known)
    if name not in names:
        listed = ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")
        raise RequestError(f"{what} {name!r}", expected=f"one of {listed}", do=near(name, names))
    return name


@contextmanager
def extra(name: str, *, what: str, instead: str = "") -> Iterator[None]:
    """Ask for one of neurograft's extras where an import in the block fails.

    Args:
        name: the extra.
        what: what it is needed for.
        instead: what would do without it.

    Raises:
        RequestError: the import failed.

    Example:
        >>> with extra("probes", what="a probe", instead="take fit='adam'"):
        ...     import no_such_module
        Traceback (most recent call last):
        neurograft.core.errors.RequestError: got a probe without no_such_module; expected the extra 'probes'; \
to mend it: pip install 'neurograft[probes]', or take fit='adam'
    """
    try:
        yield
    except ImportError as error:
        do = f"pip install 'neurograft[{name}]'" + (f", or {instead}" if instead else "")
        raise RequestError(f"{what} without {error.name or error}", expected=f"the extra {name!r}", do=do) from error
