"""Recipes as files: YAML or JSON that names verbs, methods and their options, and may name model and data too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from neurograft.core.errors import RequestError, near
from neurograft.core.trust import trusting
from neurograft.pipeline.changed import changed
from neurograft.pipeline.recipe import Recipe

FILE = ("recipe", "name", "steps", "paper", "model", "data", "options", "changes")
KINDS = {"recipe": str, "name": str, "steps": list, "model": str, "options": dict, "changes": dict}
KINDS_SAID = {str: "a text", list: "a list", dict: "a mapping"}
SUFFIXES = (".yaml", ".yml", ".json")
Trust = str | Sequence[str]


@dataclass(frozen=True)
class Opened:
    """A recipe to be carried out.

    Args:
        recipe: it, changes included.
        model: the model a file names, or None.
        data: the data a file names, or None.
    """

    recipe: Recipe
    model: str | None = None
    data: Any = None


@dataclass(frozen=True)
class _Text:
    found: Recipe | str
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> dict[str, Any]:
        return {**self.keys.get("options", {}), **self.keys.get("changes", {})}


@contextmanager
def opened(recipe: Recipe | str | Path, changes: Mapping[str, Any], trust: Trust = ()) -> Iterator[Opened]:
    """Make a recipe of what stands for one; while the block lasts, what a file names is neurograft's own or trusted.

    A file is YAML or JSON with the keys of `FILE`: either `recipe` (a name) with `options`, or `name` and `steps`;
    `model` and `data` may stand in it. It is data that anybody may have written: see `core.trust`. What `changes`
    name is the caller's own.

    Args:
        recipe: a recipe, its name, or a file.
        changes: options of the recipe by name, and arguments of its steps.
        trust: packages and dotted names whose code a file may name.

    Raises:
        RequestError: an unknown recipe, key, option or step; `trust` where there is no file.
    """
    if not is_file(recipe):
        if trust:
            raise RequestError(
                f"trust={trust!r} and no recipe file", expected="a file that names code", do="leave it out"
            )
        yield Opened(changed(str(recipe) if isinstance(recipe, Path) else recipe, changes))
        return
    text = _read(Path(str(recipe)))
    with trusting([*([trust] if isinstance(trust, str) else trust), *_dotted(changes)]):
        made = changed(text.found, {**text.changes, **changes})
        yield Opened(made, text.keys.get("model"), text.keys.get("data"))


def is_file(recipe: Recipe | str | Path) -> bool:
    """Say whether a recipe is named by its file."""
    return not isinstance(recipe, Recipe) and str(recipe).endswith(SUFFIXES)


def _dotted(value: Any) -> Iterator[str]:
    """Yield the texts with a dot in plain data."""
    if isinstance(value, str):
        yield from [value] if "." in value else []
    elif isinstance(value, (Mapping, list, tuple)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _dotted(one)


def _read(path: Path) -> _Text:
    if not path.is_file():
        raise RequestError(f"the recipe file {path}, which does not exist", expected="a file", do="check the path")
    try:
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}, which is no YAML", expected="a mapping", do=str(error)) from error
    if not isinstance(text, dict):
        raise RequestError(f"{path}, a {type(text).__name__}", expected="a mapping", do="write recipe: NAME")
    for key in text:
        if key not in FILE:
            raise RequestError(f"the key {key!r} in {path}", expected=f"one of {', '.join(FILE)}", do=near(key, FILE))
    for key, kind in KINDS.items():
        if key in text and not isinstance(text[key], kind):
            raise RequestError(
                f"{key}: {text[key]!r} in {path}", expected=KINDS_SAID[kind], do=f"write such a thing under {key}"
            )
    if "recipe" in text and "steps" in text:
        raise RequestError(f"{path} with recipe and steps", expected="one of them", do="leave one out")
    if "recipe" in text:
        return _Text(text["recipe"], text)
    if "steps" not in text:
        raise RequestError(f"{path} without recipe or steps", expected="one of them", do="write recipe: NAME")
    odd = next((s for s in text["steps"] or [None] if not isinstance(s, dict) or not isinstance(s.get("do"), str)), "")
    if odd != "":
        raise RequestError(
            f"the step {odd!r} in {path}",
            expected="at least one step, each a mapping with the verb under `do`",
            do="write it as - {do: locate, by: magnitude}",
        )
    return _Text(Recipe(text.get("name", path.stem), tuple(text["steps"]), text.get("paper")), text)
