"""What `neurograft run RECIPE --help` adds: the recipe's options, with what is taken where they are left out."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from neurograft.cli.options import arguments_of
from neurograft.core.errors import one_of

WIDTH = 78


def recipe_help(words: Sequence[str]) -> str | None:
    """Return the options of the recipe that a command line names, or the recipes' names where it names none.

    Args:
        words: behind `run`.

    Returns:
        Text for the end of the help; None where no help is asked for, or the recipe is a file.

    Raises:
        RequestError: an unknown recipe, with the near matches.

    Example:
        >>> print(recipe_help(["gmt", "--help"]).splitlines()[1])
        Options of gmt, as key=value:
    """
    if "--help" not in words:
        return None
    name = next((w for w in words if not w.startswith("-")), None)
    known = sorted(p.stem for p in (Path(__file__).parent.parent / "recipes").glob("[!_]*.py"))
    if name is None:
        return _paragraph("Recipes; name one before --help for its options:", [", ".join(known)])
    if name.endswith((".yaml", ".yml", ".json")):
        return None
    from neurograft.core.choose import option_names
    from neurograft.core.resolve import resolve

    function = resolve(f"neurograft.recipes.{one_of(name, known, what='recipe')}")
    described = arguments_of(function.__doc__ or "")
    options = [f"{n}={_typed(p.default)}: {described.get(n, '')}" for n, p in option_names(function).items()]
    return _paragraph(f"Options of {name}, as key=value:", options)


def _typed(default: object) -> str:
    """Return a default as it is typed behind `=`."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"[{', '.join(map(_typed, default))}]" if isinstance(default, (tuple, list)) else str(default)


def _paragraph(head: str, lines: Sequence[str]) -> str:
    how = {"width": WIDTH, "initial_indent": "  ", "subsequent_indent": "      ", "break_on_hyphens": False}
    # the mark tells click to leave the lines as they are
    return "\n".join(["\b", head, *(part for line in lines for part in textwrap.wrap(line, **how))])  # type: ignore[arg-type]
