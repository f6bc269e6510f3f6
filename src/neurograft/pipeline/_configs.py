"""A model's config, and the class it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neurograft.core.errors import RequestError, near, one_of
from neurograft.pipeline._hub import cut_off

SHIPPED = {"atlas": "neurograft.worlds.atlas.path"}


def config_of(name: str, options: dict[str, Any]) -> Any:
    """Return a model's config by path or Hub id: one of transformers, or the plain text of one of diffusers.

    Raises:
        RequestError: no model is there, or its config cannot be read.
    """
    path, text = Path(name), dict[str, Any]()
    if path.is_dir():
        text = _text(path)
        if "_class_name" in text:
            return text
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise RequestError(
            f"the model {name!r}, where no folder is",
            expected="a model folder or a Hub id",
            do=f"check the path; {near(path.name, beside)}" if beside else "check the path",
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if not path.is_dir() and cut_off(name):
            raise OSError("no connection to the Hub, and nothing of it in the cache")
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise (_unreadable(name, text, error) if path.is_dir() else _unreached(name)) from error


def _text(folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json says."""
    file = folder / "config.json"
    if not file.is_file():
        grafted = "; a graft's folder stands behind its base" if (folder / "graft.json").is_file() else ""
        raise RequestError(
            f"the folder {folder}", expected="a model: a config.json in it", do=f"check the path{grafted}"
        )
    try:
        text = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(
            f"{file}, which is no JSON ({error})", expected="a model's config", do="copy or download it again"
        ) from error
    if not isinstance(text, dict):
        raise RequestError(
            f"{file}, a JSON {type(text).__name__}", expected="a model's config", do="copy or download it again"
        )
    return text


def _unreadable(name: str, text: dict[str, Any], error: Exception) -> RequestError:
    return RequestError(
        f"the model {name!r} of type {text.get('model_type')!r}, which transformers cannot read ({error})",
        expected="a config of an architecture that this version of transformers knows",
        do="mend the config, install the version that defines it, or pass the live model: its anatomy is then"
        " found by dataflow",
    )


def _unreached(name: str) -> RequestError:
    beside = [*SHIPPED, *(p.name for p in Path().iterdir() if (p / "config.json").is_file())]
    return RequestError(
        f"the model {name!r}, neither a folder nor a reachable Hub model",
        expected="a model folder, a Hub id or a shipped model",
        do=f"check the name and the connection; {near(name, beside)}",
    )


def class_of(config: Any, name: str, head: str | None) -> Any:
    """Return the class of transformers that a config names, or the one with the wanted head.

    Raises:
        RequestError: it names none, or the head is unknown.
    """
    import transformers

    if head is not None:
        suffix = head.removeprefix("AutoModelFor").replace("-", " ").title().replace(" ", "") if "-" in head else head
        known = [n for n in dir(transformers) if n.startswith("AutoModelFor")]
        wanted = suffix if suffix.startswith("AutoModelFor") else f"AutoModelFor{suffix}"
        return getattr(transformers, one_of(wanted, known, what="head"))
    named = getattr(config, "architectures", None) or []
    factory = getattr(transformers, named[0], None) if named else None
    if factory is None:
        raise RequestError(
            f"{name}, whose config names {'the class ' + named[0] if named else 'no class'}",
            expected="`architectures` in config.json, with a class of transformers",
            do="load the model yourself and pass it live, or name a head",
        )
    return factory
