"""From a function's keywords to a command's options, and from what was typed to what the function takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer
import yaml

from neurograft.core.errors import RequestError

RENAMED = {"device_map": "device"}
CALLABLES = ("callbacks", "data_collator", "compute_metrics", "progress")
PAIRS = ("args", "keep", "changes", "rules")


def options_of(function: Callable[..., Any], *, skip: Iterable[str] = ()) -> list[inspect.Parameter]:
    """Return a Typer parameter for every keyword of a verb, described as in its docstring.

    Args:
        function: the verb.
        skip: parameters that the command takes as arguments.
    """
    described, made = arguments_of(function.__doc__ or ""), []
    for name, p in inspect.signature(function).parameters.items():
        if name in skip or name in CALLABLES or p.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        flag = "--" + RENAMED.get(name, name).replace("_", "-")
        text = described.get(name, "")
        kind: Any
        default: Any
        if isinstance(p.default, bool):
            kind, default = bool, p.default
        elif isinstance(p.default, (int, float)):
            kind, default = type(p.default), p.default
        elif name in PAIRS:
            kind, default, text = list[str], [], f"{text} NAME=VALUE, may be repeated."
        else:
            kind, default = str | None, typed_back(p.default)
        option = typer.Option(flag, help=text, show_default=default not in (None, []))
        made.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        )
    return made


def typed_back(default: Any) -> str | None:
    """Return a default as it would be typed."""
    if default is None or default is inspect.Parameter.empty or default == ():
        return None
    return default if isinstance(default, str) else ",".join(map(str, default))


def arguments_of(docstring: str) -> dict[str, str]:
    """Read the descriptions of a docstring's Args section.

    Example:
        >>> arguments_of("Do.\\n\\n    Args:\\n        a: first\\n            thing.\\n        b: second.\\n")
        {'a': 'first thing.', 'b': 'second.'}
    """
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(docstring).splitlines():
        if re.fullmatch(r"\w+:", line):
            inside, name = line == "Args:", ""
        elif inside and (head := re.match(r" {4}\*{0,2}(\w+): ?(.*)", line)):
            name = head[1]
            found[name] = head[2]
        elif inside and name and line.strip():
            found[name] += " " + line.strip()
    return found


def typed(name: str, text: Any, annotation: str) -> Any:
    """Return what was typed for an option as the verb takes it.

    Args:
        name: the option, for messages.
        text: what was typed; anything but a string or a list of strings is returned as it is.
        annotation: the parameter's annotation, as written.

    Example:
        >>> typed("by", "fisher:aggregate=mean", "Choice")
        ('fisher', {'aggregate': 'mean'})
        >>> typed("layers", "0,2", "Sequence[int] | None"), typed("limit", "7", "int | None")
        ([0, 2], 7)
    """
    if isinstance(text, list):
        several = annotation.startswith(("Sequence", "list", "Iterable"))
        return text if several and "Mapping" not in annotation else pairs(name, text)
    if not isinstance(text, str):
        return text
    if annotation.startswith("Choice"):
        head, colon, tail = text.partition(":")
        return (head, pairs(name, tail.split(","))) if colon and not text.startswith("{") else text
    if annotation.startswith("str"):
        return text
    if any(word in annotation for word in ("Sequence", "Iterable", "tuple")):
        words = text.strip("[]()").split(",")
        return pairs(name, words) if "Mapping" in annotation and "=" in text else [value(w) for w in words]
    return value(text)


def pairs(name: str, texts: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` words.

    Raises:
        RequestError: a word without `=`.
    """
    found = {}
    for text in texts:
        key, sign, rest = text.partition("=")
        if not sign or not key:
            raise RequestError(f"{text!r} for {name}", expected="key=value", do=f"write {name} as key=value")
        found[key.strip()] = value(rest)
    return found


def value(text: str) -> Any:
    """Read a number, a truth value, a list or a mapping; anything else is text.

    Example:
        >>> value("1e-3"), value("true"), value("[1, 2]"), value("a.jsonl")
        (0.001, True, [1, 2], 'a.jsonl')
    """
    try:
        return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def command_of(
    function: Callable[..., Any],
    body: Callable[[dict[str, Any]], None],
    *,
    arguments: Mapping[str, Any],
    extra: Iterable[inspect.Parameter] = (),
    without: Iterable[str] = (),
) -> Callable[..., None]:
    """Return a function that Typer can read: a verb's keywords as options, `body` called with what was typed.

    Args:
        function: the verb.
        body: takes the typed values by name.
        arguments: name -> annotation of positional words.
        extra: parameters of the command alone.
        without: keywords of the verb that are no options.
    """
    words = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            **({} if "None" not in str(annotation) else {"default": None}),
        )
        for name, annotation in arguments.items()
    ]
    parameters = [*words, *options_of(function, skip=[*arguments, *without]), *extra]
    own = {p.name for p in (*words, *extra)}
    known = {n: str(p.annotation) for n, p in inspect.signature(function).parameters.items()}

    def command(**given: Any) -> None:
        # what was not typed is left to the verb's own default; positional words are names, whatever they look like
        said = {n: v for n, v in given.items() if n in own or v not in (None, [])}
        body({n: v if n in arguments else typed(n, v, known.get(n, "")) for n, v in said.items()})

    command.__doc__ = (function.__doc__ or "").split("\n\n")[0]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
