"""Whether two models have the same blocks, by the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterable

from neurograft.core.errors import RequestError


def same_depth(base: Iterable[str], tuned: Iterable[str]) -> None:
    """Raise if a list of blocks that both models have is longer in one of them.

    Lists that only one has, as a head of several layers, say nothing.

    Args:
        base: names of its tensors.
        tuned: names of the other's.

    Raises:
        RequestError: naming the list.

    Example:
        >>> same_depth(["h.0.w", "h.1.w"], ["h.0.w", "h.1.w", "head.0.w"])
        >>> same_depth(["h.0.w", "h.1.w"], ["h.0.w"])
        Traceback (most recent call last):
        neurograft.core.errors.RequestError: got a tuned model with 1 blocks in 'h', where the base has 2; \
expected a tuned model of the same base; to mend it: give the base that this model was tuned from
    """
    mine, theirs = _blocks(base), _blocks(tuned)
    for name in mine.keys() & theirs.keys():
        if mine[name] != theirs[name]:
            raise RequestError(
                f"a tuned model with {len(theirs[name])} blocks in {name!r}, where the base has {len(mine[name])}",
                expected="a tuned model of the same base",
                do="give the base that this model was tuned from",
            )


def _blocks(names: Iterable[str]) -> dict[str, set[int]]:
    """Return list of blocks -> their numbers: the part of a name before its first number, and that number."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at:
            found.setdefault(".".join(parts[:at]), set()).add(int(parts[at]))
    return found
