"""Recipes as the command line names them: by name, or as a file that may name model and data too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from neurograft.core.errors import RequestError, near
from neurograft.pipeline.recipe import Recipe
from neurograft.pipeline.run import Outcome, run

FILE = ("recipe", "name", "steps", "paper", "model", "data", "options", "changes")
KINDS = {"recipe": str, "name": str, "steps": list, "model": str, "options": dict, "changes": dict}
KINDS_SAID = {str: "a text", list: "a list", dict: "a mapping"}


def run_words(words: Sequence[str], changes: Mapping[str, Any], **common: Any) -> Outcome:
    """Carry out what the command line names: RECIPE [MODEL] [DATA], the recipe by name or as a file.

    A file is YAML or JSON with the keys of `FILE`: either `recipe` (a name) with `options`, or `name` and `steps`;
    `model` and `data` may stand in it.

    Raises:
        RequestError: an unknown key, a missing model, too many words.
    """
    first, *rest = words
    text: dict[str, Any] = {}
    found: Recipe | str = first
    if first.endswith((".yaml", ".yml", ".json")):
        found, text = _read(Path(first))
    if len(rest) > 2:
        raise RequestError(
            f"the words {' '.join(words)}", expected="RECIPE [MODEL] [DATA] key=value ...", do="check them"
        )
    model = rest[0] if rest else text.get("model")
    data = rest[1] if len(rest) > 1 else text.get("data")
    if model is None:
        raise RequestError(f"the recipe {first} and no model", expected="a model", do="name it behind the recipe")
    return run(found, model, data, changes={**text.get("options", {}), **text.get("changes", {}), **changes}, **common)


def _read(path: Path) -> tuple[Recipe | str, dict[str, Any]]:
    if not path.is_file():
        raise RequestError(f"the recipe file {path}, which does not exist", expected="a file", do="check the path")
    try:
        text = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
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
        return text["recipe"], text
    if "steps" not in text:
        raise RequestError(f"{path} without recipe or steps", expected="one of them", do="write recipe: NAME")
    odd = next((s for s in text["steps"] or [None] if not isinstance(s, dict) or not isinstance(s.get("do"), str)), "")
    if odd != "":
        raise RequestError(
            f"the step {odd!r} in {path}",
            expected="at least one step, each a mapping with the verb under `do`",
            do="write it as - {do: locate, by: magnitude}",
        )
    return Recipe(text.get("name", path.stem), tuple(text["steps"]), text.get("paper")), text
