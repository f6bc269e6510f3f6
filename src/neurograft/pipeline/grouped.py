"""Data in groups: languages, tasks, concepts, told apart by a column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.core.errors import RequestError, one_of
from neurograft.pipeline.rows import Row, read_rows

COLUMN = "group"
SIDES = ("positive", "negative")


def grouped(
    state: Mapping[str, Any], *, group: str | None = None, data: Any = None, name: str = "own"
) -> dict[str, Any]:
    """Return a group's name as `group` and its rows under a name: a step of recipes that work for one group.

    Args:
        state: what the recipe has made so far, with its data.
        group: which; the first if None.
        data: rows in groups, instead of the run's.
        name: of the rows.

    Raises:
        RequestError: data without groups, or an unknown group.
    """
    found = grouped_rows(state["data"] if data is None else data)
    chosen = next(iter(found)) if group is None else one_of(group, tuple(found), what="group of the data")
    return {"group": chosen, name: found[chosen]}


def grouped_rows(data: Any) -> dict[str, list[Row]]:
    """Return group -> rows, in the order in which the groups first appear.

    Args:
        data: group -> list of rows; or whatever `read_rows` takes, with a column `group` in every row, or with
            `positive` and `negative`, which are two groups.

    Raises:
        RequestError: rows without groups.

    Example:
        >>> grouped_rows([{"text": "ja", "group": "de"}, {"text": "oui", "group": "fr"}])
        {'de': [{'text': 'ja'}], 'fr': [{'text': 'oui'}]}
    """
    if isinstance(data, Mapping) and len(data) > 1 and all(_are_rows(v) for v in data.values()):
        return {str(name): [dict(row) for row in rows] for name, rows in data.items()}
    rows = read_rows(data)
    if all(COLUMN in row for row in rows):
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(str(row[COLUMN]), []).append({k: v for k, v in row.items() if k != COLUMN})
        return found
    if all({*SIDES} <= row.keys() for row in rows):
        return {side: [row_of(row[side]) for row in rows] for side in SIDES}
    odd = next(i for i, row in enumerate(rows) if COLUMN not in row)
    raise RequestError(
        f"row {odd} with the columns {', '.join(rows[odd])}",
        expected=f"a column `{COLUMN}` in every row, such as a language or a task",
        do=f"add it, or give rows with `{SIDES[0]}` and `{SIDES[1]}`, which are two groups",
    )


def row_of(value: Any) -> Row:
    """Return one side of a pair as a row of its own."""
    return {"text": value} if isinstance(value, str) else dict(value)


def _are_rows(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(row, Mapping) for row in value)
