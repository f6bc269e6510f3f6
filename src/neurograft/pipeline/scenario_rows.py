"""Scenarios as people write them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.core.errors import RequestError
from neurograft.pipeline.rows import read_rows
from neurograft.worlds.preferences import LARGEST, Attribute, Preferences, Scenario

ROW = '{"name": ..., "question": ..., "attributes": [{"name": ..., "units": ..., "range": [low, high]}, ...]}'


def preferences_of(data: Any) -> Preferences:
    """Return data as scenarios: a world, a list of scenarios, or rows, such as those of a JSONL file.

    Args:
        data: a `Preferences`, `Scenario`s, or whatever `read_rows` takes, with `name` (or `short_name`), `question`
            and `attributes` in every row; `role` is put before the question ("Imagine you are ..."); `weights`, a list
            or name -> number from -100 to 100, are instilled instead of drawn ones; `native: true` says that nothing
            is to be instilled, and the scenario is only measured.

    Raises:
        RequestError: a row without these columns, a range that is none, two scenarios of one name.

    Example:
        >>> row = {"name": "pens", "question": "Which pen?", "attributes": [{"name": "price", "range": [0, 10]}]}
        >>> preferences_of([row]).scenarios[0].attributes[0].high
        10.0
    """
    if isinstance(data, Preferences):
        return data
    if isinstance(data, Sequence) and not isinstance(data, str) and all(isinstance(s, Scenario) for s in data):
        found = tuple(data)
    else:
        found = tuple(_scenario(row, i) for i, row in enumerate(read_rows(data)))
    names = [s.name for s in found]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None or not found:
        raise RequestError(
            "no scenarios" if twice is None else f"two scenarios named {twice!r}",
            expected="scenarios with a name each",
            do="give them names of their own",
        )
    return Preferences(found)


def _scenario(row: Mapping[str, Any], index: int) -> Scenario:
    name = row.get("name") or row.get("short_name")
    listed = row.get("attributes")
    if not isinstance(name, str) or not isinstance(row.get("question"), str) or not isinstance(listed, (list, tuple)):
        raise RequestError(
            f"row {index} with the columns {', '.join(row)}", expected=f"a scenario: {ROW}", do="write rows like this"
        )
    attributes = tuple(_attribute(a, index) for a in listed)
    question = f"Imagine you are {row['role']}. {row['question']}" if row.get("role") else row["question"]
    return Scenario(name, question, attributes, _weights(row, attributes, index), bool(row.get("native", False)))


def _attribute(given: Any, index: int) -> Attribute:
    span: Any = given.get("range") if isinstance(given, Mapping) else None
    fine = isinstance(span, (list, tuple)) and len(span) == 2 and all(_is_number(v) for v in span)
    if not fine or not isinstance(given.get("name"), str) or not span[0] < span[1]:
        raise RequestError(
            f"the attribute {given!r} of row {index}",
            expected='{"name": ..., "units": ..., "range": [low, high]} with low < high',
            do="write its range in numbers",
        )
    return Attribute(given["name"], float(span[0]), float(span[1]), str(given.get("units") or ""))


def _weights(row: Mapping[str, Any], attributes: tuple[Attribute, ...], index: int) -> tuple[float, ...] | None:
    given = row.get("weights")
    if given is None:
        return None
    if isinstance(given, Mapping):
        given = [given.get(a.name) for a in attributes] if len(given) == len(attributes) else []
    fine = isinstance(given, (list, tuple)) and len(given) == len(attributes) and all(_is_number(w) for w in given)
    if not fine or not all(abs(w) <= LARGEST for w in given):
        raise RequestError(
            f"the weights {row['weights']!r} of row {index}",
            expected=f"a number from -{LARGEST} to {LARGEST} for each of its {len(attributes)} attributes",
            do="give one for each, or leave the column out and they are drawn",
        )
    return tuple(float(w) for w in given)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
