"""One part of the change after the other."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from neurograft.core.card import method
from neurograft.core.context import Phase
from neurograft.core.errors import RequestError, near


@method()
def stages(
    step: int,
    names: Sequence[str],
    *,
    parts: Sequence[tuple[str, int]],
    repeat: bool = False,
    moments: Literal["keep", "drop"] = "keep",
) -> Phase:
    """Return which tensors are awake at a step: those of the stage it falls into.

    Args:
        step: optimizer steps made so far.
        names: names of the trainable tensors.
        parts: (pattern of names, number of steps), in order; the last stage lasts to the end unless repeated.
        repeat: start over after the last stage.
        moments: what happens to the optimizer's state of a tensor that falls asleep.

    Raises:
        RequestError: no stages, a pattern that fits no name, or a stage without steps.

    Example:
        >>> sorted(stages(3, ["a.w", "b.w"], parts=[("a.*", 2), ("b.*", 2)]).awake)
        ['b.w']
    """
    if not parts:
        raise RequestError(
            "no stages", expected="at least one (pattern, steps)", do="give parts=[('*', 1)] to train everything"
        )
    for pattern, length in parts:
        if length < 1 or not any(fnmatchcase(n, pattern) for n in names):
            raise RequestError(
                f"the stage ({pattern!r}, {length})",
                expected="a pattern of trainable tensors and at least one step",
                do=near(pattern, names),
            )
    whole = sum(length for _, length in parts)
    left = step % whole if repeat else min(step, whole - 1)
    for number, (pattern, length) in enumerate(parts):
        if left < length:
            awake = frozenset(n for n in names if fnmatchcase(n, pattern))
            return Phase(awake=awake, moments=moments, stage=f"{number}:{pattern}")
        left -= length
    raise AssertionError
