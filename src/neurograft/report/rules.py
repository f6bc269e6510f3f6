"""The rules of the verdict: plain data, to be edited in Python, JSON or YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from neurograft.core.errors import RequestError, near

DEFAULT: Mapping[str, Any] = {
    "level": 0.95,  # of every interval; a finding needs its one-sided half, 2.5 %
    "gain": "auto",  # measure that decides on the gain
    "gain_above": 0.0,  # the gain's interval must lie above this and above the noise floor
    "tolerance": 0.01,  # loss in nats per token or item that is accepted beyond the noise floor
    "tolerances": {},  # domain -> its own tolerance
    "floor_cap": 0.02,  # no noise floor excuses more than this
    "limits": {},  # measure -> what more is limited on every domain, e.g. flips, kl, ece, errors
    "min_items": 8,  # fewer items decide nothing
    "correction": "holm",  # over domains and limits; or "none"
    "nulls": 8,  # random changes that measure the noise floor
    "draws": 2000,  # of the bootstrap
}
Rules = Mapping[str, Any] | str | Path | None


def rules_of(given: Rules) -> dict[str, Any]:
    """Return the default rules with changes; a file may be given, by path or as the key "file" of a mapping.

    Raises:
        RequestError: an unknown rule, or a value of another type.

    Example:
        >>> rules_of({"tolerance": 0.05})["tolerance"]
        0.05
    """
    if given is None:
        return dict(DEFAULT)
    if isinstance(given, (str, Path)):
        given = _read(Path(given))
    elif "file" in given:
        given = {**_read(Path(given["file"])), **{k: v for k, v in given.items() if k != "file"}}
    for name, value in given.items():
        if name not in DEFAULT:
            raise RequestError(f"the rule {name!r}", expected=f"one of {', '.join(DEFAULT)}", do=near(name, DEFAULT))
        _check(name, value)
    return {**DEFAULT, **given}


def _check(name: str, value: Any) -> None:
    default = DEFAULT[name]
    good = {
        float: isinstance(value, (int, float)) and not isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        str: isinstance(value, str),
    }.get(type(default), isinstance(value, Mapping) and all(isinstance(v, (int, float)) for v in value.values()))
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    good = good and all(math.isfinite(v) for v in numbers if isinstance(v, float))
    if name == "level":
        good = good and 0.5 < value < 1
    if name in ("draws", "min_items"):
        good = good and value >= 1
    if name == "correction":
        good = value in ("holm", "none")
    if name == "nulls":
        good = good and (value == 0 or value >= 3)
    if not good:
        raise RequestError(
            f"the rule {name}: {value!r}", expected=f"a value like {default!r}", do=f"leave it at {default!r}"
        )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RequestError(f"the rules file {path}, which does not exist", expected="a file", do="check the path")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RequestError(f"{path}, which is no YAML or JSON", expected="a mapping", do=str(error)) from error
    if not isinstance(found, dict):
        raise RequestError(f"{path}, a {type(found).__name__}", expected="a mapping", do="write tolerance: 0.02")
    return found
