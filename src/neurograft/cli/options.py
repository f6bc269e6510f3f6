"""From a function's keywords to a command's options, and from what was typed to what the function takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer
import yaml

from neurograft.cli.wording import PAIRS, arguments_of, as_typed, metavar, with_choices
from neurograft.core.errors import RequestError

RENAMED = {"device_map": "device"}
CALLABLES = ("callbacks", "data_collator", "compute_metrics", "progress", "relocate")


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
        elif str(p.annotation).startswith(("int |", "float |")):
            kind, default = (int if str(p.annotation).startswith("int") else float) | None, p.default
        elif name in PAIRS:
            kind, default, text = list[str], [], f"{text} NAME=VALUE, may be repeated."
        else:
            kind, default = str | None, typed_back(p.default)
        text = with_choices(text)
        option = typer.Option(flag, help=text, show_default=default not in (None, []), metavar=metavar(name, p))
        made.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        )
    return made


def typed_back(default: Any) -> str | None:
    """Return a default as it would be typed."""
    if default is None or default is inspect.Parameter.empty or default == ():
        return None
    return default if isinstance(default, str) else ",".join(map(str, default))


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
    if not text.strip():
        raise RequestError(f"{name} and nothing for it", expected="a value", do="give one, or leave the option out")
    if annotation.startswith("Probes") and "," in text and ":" not in text:
        return text.split(",")
    if annotation.startswith(("Choice", "Probes")):
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
            what = "NAME=FILE" if name == "keep" else "key=value"
            raise RequestError(f"{text!r} for {name}", expected=what, do=f"write it as {what}")
        if key.strip() in found:
            raise RequestError(f"{key.strip()!r} twice for {name}", expected="every name once", do="leave one out")
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

    flags = {p.name: "--" + RENAMED.get(p.name, p.name).replace("_", "-") for p in parameters if p not in words}

    def command(**given: Any) -> None:
        try:
            # what was not typed is left to the verb's own default; words and paths are names, whatever they look like
            said = {n: v for n, v in given.items() if n in own or v not in (None, [])}
            body({n: v if n in own else typed(n, v, known.get(n, "")) for n, v in said.items()})
        except RequestError as error:
            came, expected, do = (as_typed(text, flags) for text in (error.came, error.expected, error.do))
            raise RequestError(came, expected=expected, do=do) from error

    command.__doc__ = (function.__doc__ or "").split("\n\n")[0]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
