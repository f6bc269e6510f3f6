"""A choice of method: a name, (name, options) or a callable, everywhere."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neurograft.core.card import Card
from neurograft.core.errors import RequestError, near, one_of
from neurograft.core.resolve import resolve
from neurograft.core.typed import annotations_of, fits, in_words

ROOMS = (
    "locators",
    "selectors",
    "adapters",
    "objectives",
    "schedules",
    "optimizers",
    "data",
    "edits",
    "mergers",
    "routers",
    "audits",
    "networks",
    "worlds",
    "export",
)

Choice = str | tuple[str, Mapping[str, Any]] | Callable[..., Any] | None


@dataclass(frozen=True)
class Chosen:
    """A method with its options.

    Args:
        function: the method.
        options: keyword options given for it.
        name: its dotted name, or that of a foreign callable, for cards.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def card(self) -> Card:
        """The method's card; an empty one for a foreign callable."""
        found: Card = getattr(self.function, "card", Card())
        return found

    def __call__(self, *args: Any, **more: Any) -> Any:
        given = {**self.options, **more}
        try:
            return self.function(*args, **given)
        except TypeError as error:
            lacking = [n for n, p in option_names(self.function).items() if p.default is p.empty and n not in given]
            if not lacking:
                raise
            short = self.name.rpartition(".")[2]
            raise RequestError(
                f"{short} without {', '.join(lacking)}",
                expected="these options",
                do=f'("{short}", {{"{lacking[0]}": ...}})',
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for recipes and cards."""
        return {"path": self.name, "options": {k: _plain(v) for k, v in self.options.items()}}


def _plain(value: Any) -> Any:
    """Return what a card says of an option: the identity of a graft or describer, the digest of a selection, a model's
    class in the place of the thing itself."""
    for name in ("identity", "digest"):
        if isinstance(found := getattr(value, name, None), str):
            return found
    from torch import nn

    return type(value).__name__ if isinstance(value, nn.Module) else value


def methods(room: str) -> list[str]:
    """Return the public methods of a room, as found in its folder.

    Example:
        >>> "top" in methods("selectors")
        True
    """
    package = resolve(f"neurograft.{one_of(room, ROOMS, what='room')}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def choose(room: str, choice: Any, **options: Any) -> Chosen:
    """Turn a choice into a method with checked options.

    Args:
        room: the room a bare name is looked up in.
        choice: a name, a dotted name, (name, options), or a callable.
        **options: more options.

    Raises:
        RequestError: an unknown method, or an option it does not have, with the near matches.

    Example:
        >>> choose("selectors", ("top", {"fraction": 0.01})).options
        {'fraction': 0.01}
    """
    if isinstance(choice, Chosen):
        check_options(choice.function, options, choice.name)
        return Chosen(choice.function, {**choice.options, **options}, choice.name)
    if isinstance(choice, (tuple, list)) and len(choice) == 2:
        choice, given = choice
        options = {**_options(room, given), **options}
    if isinstance(choice, Mapping) and "path" in choice and set(choice) <= {"path", "options"}:
        options = {**_options(room, choice.get("options", {})), **options}
        choice = choice["path"]
    if isinstance(choice, str):
        dotted = choice if "." in choice else f"neurograft.{room}.{one_of(choice, methods(room), what=_singular(room))}"
        function, name = resolve(dotted), dotted
    elif callable(choice):
        function = choice
        name = f"{getattr(choice, '__module__', '?')}.{getattr(choice, '__qualname__', type(choice).__name__)}"
    else:
        raise RequestError(
            f"the choice {choice!r}",
            expected="a name, (name, options) or a callable",
            do=f"name a method of {room}: {', '.join(methods(room)[:8])}",
        )
    check_options(function, options, name)
    return Chosen(function, options, name)


def _options(room: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(
            f"options of type {type(given).__name__} for a method of {room}",
            expected="a mapping of options to values",
            do='write ("top", {"fraction": 0.01})',
        )
    return given


def _singular(room: str) -> str:
    return f"a method of {room}" if room in ("data", "export") else room.removesuffix("s")


def option_names(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return a method's keyword-only parameters."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(function: Callable[..., Any], options: Mapping[str, Any], name: str) -> None:
    """Raise if a method does not have one of the options, or cannot take its value; see `core.typed.fits`.

    A foreign callable may take what it likes.

    Raises:
        RequestError: an unknown option, with the near matches; no number where the method takes one.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    types = annotations_of(function)
    for option, value in options.items():
        if option not in known and not anything:
            raise RequestError(
                f"the option {option!r} of {name}",
                expected=f"one of {', '.join(option_names(function))}",
                do=near(option, option_names(function) or known),
            )
        if not fits(value, types.get(option, Any)):
            raise RequestError(
                f"{option}={value!r} of {name}",
                expected=in_words(types[option]),
                do=f"write {option}=[{value}]" if fits([value], types[option]) else f"give {option} such a value",
            )
