"""Recipes: which composition of verbs is this paper? Plain data, made by a function of `neurograft.recipes`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from neurograft.core.choose import Chosen, asked, check_options, option_names
from neurograft.core.errors import one_of
from neurograft.core.resolve import resolve

SHIPS = ("operations", "weights")  # how a step `intervene` makes its graft: {"do": "intervene", "ship": "weights", ...}

# The verbs a step may do: what of the state each is given, by its argument's name, and the name its result gets.
VERBS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "locate": (("model", "data"), "scores"),
    "select": (("scores",), "where"),
    "evidence": (("model", "where", "data"), "evidence"),
    "tune": (("model", "data", "where"), "graft"),
    "audit": (("model", "graft"), "report"),
    "edit": (("model", "requests"), "graft"),
    "intervene": (("model", "where"), "graft"),
}


@dataclass(frozen=True)
class Recipe:
    """A chain of verbs; each finds what the ones before it made.

    Args:
        name: the recipe's name; a paper's slug with `_`.
        steps: dicts `{"do": verb, **keyword arguments of that verb}`. `locate` makes scores, `select` a
            selection, `tune` and `edit` a graft, `audit` a report; `as` gives the result another name, "$name" stands
            for an earlier result, and `on` names grafts that are on the model meanwhile. Instead of a verb, a dotted
            path to a function `(state, **arguments) -> state` may stand, for papers about networks of their own.
        paper: the paper's slug, or None.
        options: the options it was made with.
        network: for a paper about a network of its own: its dotted name and its options, with which `run` makes it
            where its name is given for the model.

    Example:
        >>> r = Recipe("half", ({"do": "locate", "by": "noise", "units": "neuron"}, {"do": "select", "fraction": 0.5}))
        >>> [step["do"] for step in r.steps]
        ['locate', 'select']
    """

    name: str
    steps: tuple[Mapping[str, Any], ...]
    paper: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    network: tuple[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for step in self.steps:
            do = step.get("do", "")
            if "." not in do:
                one_of(do, VERBS, what="the step")
            if do == "intervene":
                one_of(step.get("ship", SHIPS[0]), SHIPS, what="form of a graft")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a graft's card."""
        return {"name": self.name, "paper": self.paper, "options": dict(self.options)}


def recipe(name: str, **changes: Any) -> Recipe:
    """Make a recipe by name.

    Args:
        name: a file of `neurograft.recipes`, or a dotted path to a function that returns a `Recipe`.
        **changes: its options.

    Raises:
        RequestError: an unknown recipe or option, with the near matches.
    """
    dotted = name if "." in name else f"neurograft.recipes.{one_of(name, recipes(), what='recipe')}"
    function = asked(dotted)
    check_options(function, changes, name)
    made: Recipe = Chosen(function, changes, dotted, "recipes")()
    defaults = {k: p.default for k, p in option_names(function).items()}
    return replace(made, options={**defaults, **changes})


def recipes() -> list[str]:
    """Return the recipes found in their folder."""
    import pkgutil

    package = resolve("neurograft.recipes")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
