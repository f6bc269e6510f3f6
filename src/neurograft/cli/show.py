"""Printing results: for people by default, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import track
from rich.table import Table
from rich.text import Text

NARROW = 60  # columns of a terminal in which prose does not stand beside numbers


def dump(value: Any) -> str:
    """Return a result as JSON."""
    return json.dumps(plain(value), indent=1, sort_keys=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Return a result as data that JSON can hold."""
    if hasattr(value, "as_dict"):
        return plain(value.as_dict())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _natural(table: Table) -> int:
    """Return how wide a table is if nothing is folded."""
    return sum(max(map(cell_len, (str(c.header), *map(str, c.cells)))) + 3 for c in table.columns)


def _records(table: Table) -> Group:
    """Return a table's rows one below the other, for a terminal in which its columns would be a few signs wide."""
    names = [str(column.header) for column in table.columns]
    rows = [
        (Text(f"{name}: {cell}" if i else str(cell), style="" if i else "bold"), 2 if i else 0)
        for row in zip(*(column.cells for column in table.columns))
        for i, (name, cell) in enumerate(zip(names, row))
    ]
    return Group(*(Padding(text, (0, 0, 0, indent)) for text, indent in rows))


class _Console(Console):
    """A console whose reader may leave, as in `neurograft papers | head`: what a command did and its status stand."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Shown:
    """Where a command's results go.

    Args:
        as_json: print JSON alone.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        wide = None if sys.stdout.isatty() else 160  # a pipe has no width of its own
        self.console = _Console(highlight=False, soft_wrap=True, width=wide)

    def result(self, data: Any, *, lines: Iterable[str | Text] = (), table: Table | None = None) -> None:
        """Print a result: `data` as JSON, or lines and a table for people."""
        if self.as_json:
            self.console.print(dump(data), markup=False)
            return
        for line in lines:
            self.console.print(line, markup=False)
        if table is None:
            return
        if self.console.width < NARROW and _natural(table) > 1.5 * self.console.width:
            self.console.print(_records(table), soft_wrap=False)
        else:
            self.console.print(table)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show, on standard error and where somebody looks, that something is being done."""
        errors = Console(stderr=True)
        return errors.status(what) if errors.is_terminal and not self.as_json else nullcontext()

    def progress(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        """Show a bar over items, on standard error, where somebody looks."""
        errors = Console(stderr=True)
        return track(items, description=what, console=errors, disable=self.as_json or not errors.is_terminal)


def table_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, title: str = "") -> Table:
    """Return rows of plain data as a table."""
    columns = columns or (list(rows[0]) if rows else [])
    made = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        number = bool(rows) and all(isinstance(r.get(name), (int, float)) for r in rows)
        made.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*[_cell(row.get(name)) for name in columns])
    return made


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def size(path: Path) -> str:
    """Return the size of a file or of a folder's files, for people.

    Example:
        >>> human(2048)
        '2.0 KB'
    """
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return human(sum(p.stat().st_size for p in files))


def human(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GB"
