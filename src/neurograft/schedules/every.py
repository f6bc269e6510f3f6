"""Another selection every so many steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from neurograft.core.card import method
from neurograft.core.context import Phase
from neurograft.core.errors import RequestError


@method(needs={"rehearse"})
def every(
    step: int,
    names: Sequence[str],
    *,
    steps: int,
    until: int | None = None,
    first: bool = False,
    moments: Literal["keep", "drop"] = "keep",
    values: Literal["keep", "rewind"] = "keep",
) -> Phase:
    """Ask the locator anew every so many steps; what is left behind keeps its values and stops moving, or goes back.

    Args:
        step: optimizer steps made so far.
        names: names of the trainable tensors.
        steps: how often.
        until: the last step at which it may happen; None for no end.
        first: ask at step 0 too, in the place of the selection the training was given.
        moments: whether entries that stay keep their optimizer state.
        values: "keep" what was learned, or "rewind" all of it to the base, once the new choice is made.

    Raises:
        RequestError: `steps` is not positive.

    Example:
        >>> [step for step in range(10) if every(step, [], steps=4).reselect]
        [4, 8]
    """
    if steps < 1:
        raise RequestError(f"a selection every {steps} steps", expected="at least 1", do="give a positive number")
    turn = (step if until is None else min(step, until)) // steps
    now = step % steps == 0 and (step > 0 or first) and (until is None or step <= until)
    return Phase(reselect=now, moments=moments, values=values, turn=turn, stage=f"{turn}")
