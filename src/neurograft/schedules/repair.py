"""Everything trains on the stream; every so often a few modules alone train on a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from neurograft.core.card import method
from neurograft.core.context import Phase
from neurograft.core.errors import RequestError, near


@method(
    paper="fpf",
    departs="The paper's period and length could not be read. The data change with the stage in the plain loop "
    "(`fit` with `data.reservoir.Replay`), not in the Trainer.",
)
def repair(
    step: int,
    names: Sequence[str],
    *,
    awake: Sequence[str],
    every: int,
    length: int,
    times: int | None = None,
    moments: Literal["keep", "drop"] = "keep",
) -> Phase:
    """Alternate `every` steps of stage "stream" (all awake) with `length` of stage "repair" (a few awake): k-FPF.

    Args:
        step: optimizer steps made so far.
        names: names of the trainable tensors.
        awake: patterns of the tensors that train in a repair.
        every: steps on the stream before each repair: tau.
        length: steps of a repair.
        times: repairs in all: k; None for no end.
        moments: what happens to the optimizer's state of tensors that fall asleep.

    Raises:
        RequestError: a pattern that fits no tensor, or a period or length below 1.

    Example:
        >>> [repair(s, ["head.w", "low.w"], awake=["head.*"], every=2, length=1).stage for s in range(6)]
        ['stream', 'stream', 'repair:0', 'stream', 'stream', 'repair:1']
    """
    for pattern in awake:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise RequestError(
                f"the pattern {pattern!r} of a repair", expected="a trainable tensor", do=near(pattern, names)
            )
    if every < 1 or length < 1 or not awake:
        raise RequestError(
            f"repairs of {len(awake)} patterns for {length} steps every {every}",
            expected="at least one of each",
            do="give awake, every and length",
        )
    number, place = divmod(step, every + length)
    if place < every or (times is not None and number >= times):
        return Phase(moments=moments, stage="stream")
    few = frozenset(n for n in names if any(fnmatchcase(n, p) for p in awake))
    return Phase(awake=few, moments=moments, stage=f"repair:{number}")
