"""What a schedule says of a step, and a loop obeys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phase:
    """What a schedule says of one step.

    Args:
        awake: names of the trainable tensors that move; None for all.
        lr: name -> learning-rate multiplier, 1 where absent.
        moments: what happens to a tensor's optimizer state when it falls asleep: "keep" or "drop".
        values: what happens then to its values: "keep", what is left behind stays and stops moving, or "rewind", it
            goes back to what the training began with; where the locator is called again, everything goes back to the
            base and the new choice starts there.
        reselect: whether the loop should call the locator again and carry the values over.
        turn: how often the selection has changed up to this step, for schedules that select anew.
        stage: name of the stage, for logs and for swapping objective or data.
    """

    awake: frozenset[str] | None = None
    lr: Mapping[str, float] = field(default_factory=dict)
    moments: str = "keep"
    reselect: bool = False
    values: str = "keep"
    turn: int = 0
    stage: str = ""
