"""A recipe with other options, or with other arguments of its steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neurograft.core.choose import asked, option_names
from neurograft.core.errors import RequestError, near
from neurograft.core.resolve import resolve
from neurograft.pipeline.recipe import Recipe, recipe


def changed(found: Recipe | str, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with its options and its steps' arguments changed.

    Raises:
        RequestError: a step the recipe does not have, or options for a recipe made already.
    """
    options = {k: v for k, v in changes.items() if "." not in k}
    if isinstance(found, str):
        found = recipe(found, **options)
    elif options:
        raise RequestError(
            f"the options {', '.join(options)} for a recipe made already",
            expected="arguments of its steps, such as 'tune.args'",
            do=f"make it with them: ng.recipe({found.name!r}, {next(iter(options))}=...)",
        )
    for key, value in changes.items():
        if "." in key:
            found = _set(found, key, value)
    return found


def _set(found: Recipe, key: str, value: Any) -> Recipe:
    """Change an argument in every step of a verb, or of a function by its last name: each keeps its other arguments."""
    called = {name: s["do"] for s in found.steps for name in (s["do"], s["do"].rpartition(".")[2])}
    do = max((name for name in called if key.startswith(f"{name}.")), key=len, default=None)
    if do is None:
        raise RequestError(
            f"a change of the step {key.partition('.')[0]!r} of {found.name}",
            expected=f"one of {', '.join(dict.fromkeys(s['do'].rpartition('.')[2] for s in found.steps))}",
            do="change a step the recipe has",
        )
    first, _, rest = key[len(do) + 1 :].partition(".")
    function = asked(called[do]) if "." in called[do] else resolve(f"neurograft.pipeline.{do}")
    known = option_names(function)
    loose = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    mine = [s for s in found.steps if s["do"] == called[do]]
    if first not in known and not loose and not any(first in s for s in mine):
        raise RequestError(
            f"the argument {first!r} of {do}", expected=f"one of {', '.join(known)}", do=near(first, known)
        )
    steps = [{**s, first: _within(s.get(first), rest, value, key)} if s["do"] == called[do] else s for s in found.steps]
    return replace(found, steps=tuple(steps))


def _within(before: Any, rest: str, value: Any, key: str) -> Any:
    """Return an argument's new value; "args.max_steps" reaches into a dict, "by.mask" into a choice's options."""
    if not rest:
        return value
    if isinstance(before, (tuple, list)) and len(before) == 2 and isinstance(before[1], Mapping):
        return (before[0], {**before[1], rest: value})
    if before is not None and not isinstance(before, Mapping):
        raise RequestError(
            f"a change of {key}, within {before!r}",
            expected="something with names inside",
            do=f"give {key[: -len(rest) - 1]} as a whole",
        )
    return {**(before or {}), rest: value}
