"""A choice of method: a name, (name, options) or a callable, everywhere."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neurograft.core.card import Card
from neurograft.core.errors import CALLED_AS, RequestError, RunError, near, one_of
from neurograft.core.resolve import resolve
from neurograft.core.trust import check
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

HOMES = tuple(f"neurograft.{home}" for home in (*ROOMS, "pipeline", "recipes"))  # of what a recipe file may name
# What a method of a room is called with, and what it makes: read where somebody's own callable does neither.
CALLED: Mapping[str, tuple[str, str]] = {
    "locators": ("(Context, **options) -> Scores", "neurograft.core.selection.Scores"),
    "selectors": ("(Scores, **options) -> Selection", "neurograft.core.selection.Selection"),
    "adapters": ("(model, Selection, **options) -> Mount", "neurograft.core.compact.mount.Mount"),
    "objectives": ("(Step, **options) -> loss", ""),
    "schedules": ("(step, names, **options) -> Phase", "neurograft.core.phase.Phase"),
    "edits": ("(Context, Selection, **options) -> Graft", "neurograft.core.grafts.graft.Graft"),
    "audits": ("(model, change, batches, **options) -> mapping", "collections.abc.Mapping"),
    "recipes": ("(**options) -> Recipe", "neurograft.pipeline.recipe.Recipe"),
    "steps": ("(state, **arguments) -> more of the state", ""),
    "metrics": ("(model, batch) -> one number for each row", ""),
}

Choice = str | tuple[str, Mapping[str, Any]] | Callable[..., Any] | None


@dataclass(frozen=True)
class Chosen:
    """A method with its options.

    Args:
        function: the method.
        options: keyword options given for it.
        name: its dotted name, or that of a foreign callable, for cards.
        room: whose method it stands for, which says how it is called.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    room: str = ""

    @property
    def card(self) -> Card:
        """The method's card; an empty one for a foreign callable."""
        found: Card = getattr(self.function, "card", Card())
        return found

    def __call__(self, *args: Any, **more: Any) -> Any:
        given = {**self.options, **more}
        how, makes = CALLED.get(self.room, ("", ""))
        try:
            found = self.function(*args, **given)
        except (RequestError, RunError):
            raise
        except Exception as error:
            lacking = [n for n, p in option_names(self.function).items() if p.default is p.empty and n not in given]
            if isinstance(error, TypeError) and lacking:
                short = self.name.rpartition(".")[2]
                raise RequestError(
                    f"{short} without {', '.join(lacking)}",
                    expected="these options",
                    do=f'("{short}", {{"{lacking[0]}": ...}})',
                ) from error
            if how and not self.name.startswith(f"neurograft.{self.room}."):
                error.add_note(f"{CALLED_AS}{self.name}: {how}")
            raise
        if makes and not isinstance(found, resolve(makes)):
            raise RequestError(
                f"{self.name}, which returned a {type(found).__name__}",
                expected=f"a callable {how}",
                do=f"name a method of {self.room}, or let it return that",
            )
        return found

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
        return Chosen(choice.function, {**choice.options, **options}, choice.name, choice.room)
    if isinstance(choice, (tuple, list)) and len(choice) == 2:
        choice, given = choice
        options = {**_options(room, given), **options}
    if isinstance(choice, Mapping) and "path" in choice and set(choice) <= {"path", "options"}:
        options = {**_options(room, choice.get("options", {})), **options}
        choice = choice["path"]
    if isinstance(choice, str):
        home = choice.split(".")[1] if choice.startswith("neurograft.") else room
        if home != room and home in ROOMS:
            raise RequestError(
                f"{choice!r}, of {home}",
                expected=f"a method of {room}",
                do=f"name one of {', '.join(methods(room)[:8])}",
            )
        dotted = choice if "." in choice else f"neurograft.{room}.{one_of(choice, methods(room), what=_singular(room))}"
        function, name = asked(dotted), dotted
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
    return Chosen(function, options, name, room)


def asked(dotted: str) -> Callable[..., Any]:
    """Return the callable that somebody's words name.

    Raises:
        RequestError: there is none, it is no callable whose parameters can be read, or a recipe file names it and
            may not; see `core.trust`.
    """
    check(dotted, HOMES)
    found = resolve(dotted)
    check(dotted, HOMES, found)
    try:
        inspect.signature(found)
    except (TypeError, ValueError) as error:
        what = f"a {type(found).__name__}" if not callable(found) else "whose parameters cannot be read"
        raise RequestError(
            f"the name {dotted!r}, {what}",
            expected="a function, or another callable",
            do="name one" if not callable(found) else "name a function of your own that calls it",
        ) from error
    return found


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
