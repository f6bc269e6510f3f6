"""Whether a value is of the type an option is annotated with; only where that cannot be mistaken."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

SERIES = (collections.abc.Sequence, collections.abc.Iterable, list, tuple)
NUMBERS: Mapping[Any, type] = {int: Integral, float: Real, bool: bool}
WORDS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a callable's annotations as types; of a class or an object, those of what is called.

    Annotations of foreign code that are no types (PEP 3107 asks for none), or whose names are imported for type
    checkers alone, say nothing: no types then. Our own must be readable, or options would go unchecked.

    Raises:
        NameError: an annotation of this package names what its module does not hold.

    Example:
        >>> import torch
        >>> annotations_of(torch.optim.SGD)["momentum"]
        <class 'float'>
    """
    while isinstance(function, functools.partial):
        function = function.func
    called: Any = function if inspect.isroutine(function) else type(function).__call__
    if inspect.isclass(function):
        called = function.__init__
    try:
        return typing.get_type_hints(called)
    except Exception:
        if str(getattr(called, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]:
            raise
        return {}


def fits(value: Any, annotation: Any) -> bool:
    """Say whether a value may stand for an option: False only for numbers and series of numbers that are none.

    Whole numbers stand for floats; tensors and arrays for what they hold; whatever is annotated with text or with
    a type of ours is left to the function.

    Args:
        value: what was given.
        annotation: the option's type.

    Example:
        >>> fits(1, float), fits("two", int), fits(1.5, int | None), fits(0, list[int]), fits(None, float | None)
        (True, False, False, False, True)
    """
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(fits(value, one) for one in typing.get_args(annotation))
    if annotation in (None, type(None)):
        return value is None
    if hasattr(value, "__array__"):
        return True
    if annotation in NUMBERS:
        return isinstance(value, NUMBERS[annotation])
    origin = typing.get_origin(annotation) or annotation
    if origin not in SERIES:
        return True
    if value is None or isinstance(value, (str, Real)):
        return False
    inside = [a for a in typing.get_args(annotation) if a is not Ellipsis]
    if not isinstance(value, (list, tuple)) or len(inside) != 1:
        return True
    return all(fits(one, inside[0]) for one in value)


def in_words(annotation: Any) -> str:
    """Return an option's type as a reader would say it.

    Example:
        >>> in_words(int), in_words(float | None), in_words(list[int])
        ('a whole number', 'a number or nothing', 'list[int]')
    """
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " or ".join(in_words(one) for one in typing.get_args(annotation))
    if annotation in (None, type(None)):
        return "nothing"
    return WORDS.get(annotation) or inspect.formatannotation(annotation).replace("collections.abc.", "")
