"""Whom a training asks for other units when its schedule selects anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from neurograft.core.choose import choose, option_names
from neurograft.core.errors import RequestError
from neurograft.core.seeds import derive
from neurograft.core.selection import Selection
from neurograft.pipeline.locate import locate
from neurograft.pipeline.select import select

Ask = Mapping[str, Mapping[str, Any]]
Reselect = Ask | Sequence[Ask] | Callable[[nn.Module, int], Selection] | None


def asker(reselect: Reselect, rows: Any, seed: int, schedule: Any) -> Callable[[nn.Module, int], Selection] | None:
    """Return what the loop calls: (model, step) -> Selection.

    Args:
        reselect: such a callable; or arguments of `locate` and `select`, or a list of them that take turns; or None.
        rows: the examples to locate on, where the arguments name none.
        seed: root of the locators' random numbers.
        schedule: whose turns are counted.

    Raises:
        RequestError: arguments of something else.
    """
    if reselect is not None and schedule is None:
        raise RequestError(
            "reselect without a schedule",
            expected="one that selects anew",
            do="give schedule=('every', {'steps': 100})",
        )
    if reselect is None or callable(reselect):
        return reselect
    asks: list[Any] = list(reselect) if isinstance(reselect, (list, tuple)) else [reselect]
    for one in asks or [{}]:
        named = isinstance(one, Mapping) and all(isinstance(arguments, Mapping) for arguments in one.values())
        if not named or set(one) - {"locate", "select"} or "locate" not in one:
            raise RequestError(
                f"reselect={reselect!r}",
                expected="'locate' and 'select', each with that verb's arguments",
                do="reselect={'locate': {'by': 'grad_x_act'}, 'select': {'fraction': 0.01}}",
            )
        choose("locators", one["locate"].get("by", "grad_x_act"))  # now, not when training has come so far
        choose("selectors", one.get("select", {}).get("by", "top"))

    def ask(model: nn.Module, step: int) -> Selection:
        turn, whose = divmod(choose("schedules", schedule)(step, []).turn, len(asks))
        one = asks[whose]
        scores = locate(model, **{"data": rows, "seed": derive(seed, "reselect", step), **one["locate"]})
        how = dict(one.get("select", {}))
        if "turn" in option_names(choose("selectors", how.get("by", "top")).function):
            how["turn"] = turn
        return select(scores, **how)

    return ask
