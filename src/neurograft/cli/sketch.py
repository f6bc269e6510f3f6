"""What the command line must know of a verb before it runs: its signature and its docstring, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neurograft.core.resolve import resolve

ROOT = Path(__file__).parent.parent


def sketch(dotted: str) -> Callable[..., Any]:
    """Return a function that looks like a verb and imports it only when it is called.

    Help and mistyped options then need nothing heavy. A verb with a default that is no literal is imported.

    Args:
        dotted: the verb, e.g. `neurograft.pipeline.locate`.

    Example:
        >>> import inspect
        >>> list(inspect.signature(sketch("neurograft.pipeline.select")).parameters)[:2]
        ['scores', 'by']
    """
    found = definition(dotted)
    if found is None:
        whole: Callable[..., Any] = resolve(dotted)
        return whole
    bare = ast.FunctionDef(found.name, found.args, [ast.Pass()], [], found.returns, lineno=1, col_offset=0)
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    made: dict[str, Any] = {}
    try:
        exec(compile(ast.fix_missing_locations(ast.Module([future, bare], [])), dotted, "exec"), made)
    except NameError:
        whole = resolve(dotted)
        return whole

    def verb(*args: Any, **given: Any) -> Any:
        return resolve(dotted)(*args, **given)

    verb.__doc__ = ast.get_docstring(found, clean=False)
    verb.__wrapped__ = made[found.name]  # type: ignore[attr-defined]  # where `inspect.signature` looks
    return verb


def definition(dotted: str) -> ast.FunctionDef | None:
    """Return a verb's definition, without importing it; None if this version lacks the verb."""
    *folders, last = dotted.split(".")[1:]
    for file in (ROOT.joinpath(*folders, last + ".py"), ROOT.joinpath(*folders).with_suffix(".py")):
        if file.is_file():
            tree = ast.parse(file.read_text(encoding="utf-8"))
            return next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == last), None)
    return None
