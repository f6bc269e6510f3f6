"""`run`: carry a recipe out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from neurograft.core.choose import option_names
from neurograft.core.errors import RequestError, near
from neurograft.core.grafts.graft import Graft
from neurograft.core.resolve import resolve
from neurograft.core.selection import Scores, Selection
from neurograft.pipeline._network import network
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.recipe import SHIPS, Recipe, recipe

# What each verb is given of the state, by its argument's name, and the name its result gets.
GIVEN: Mapping[str, tuple[tuple[str, ...], str]] = {
    "locate": (("model", "data"), "scores"),
    "select": (("scores",), "where"),
    "evidence": (("model", "where", "data"), "evidence"),
    "tune": (("model", "data", "where"), "graft"),
    "audit": (("model", "graft"), "report"),
    "edit": (("model", "requests"), "graft"),
    "intervene": (("model", "where"), "graft"),
}


@dataclass
class Outcome:
    """What a recipe made.

    Args:
        state: every result by its name: `scores`, `where`, `graft`, `report`, and what the recipe named itself.
    """

    state: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """The last scores."""
        return self._of("scores")

    @property
    def where(self) -> Selection:
        """The last selection."""
        return self._of("where")

    @property
    def graft(self) -> Graft:
        """The last graft."""
        return self._of("graft")

    @property
    def report(self) -> Any:
        """The last report."""
        return self._of("report")

    def _of(self, name: str) -> Any:
        if self.state.get(name) is None:
            raise RequestError(
                f"{name!r} of a recipe that made none",
                expected=f"one of {', '.join(k for k, v in self.state.items() if v is not None)}",
                do="use a recipe with that step",
            )
        return self.state[name]


def run(
    recipe: Recipe | str,
    model: Model,
    data: Any = None,
    *,
    changes: Mapping[str, Any] | None = None,
    processing_class: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    seed: int = 0,
    **given: Any,
) -> Outcome:
    """Carry a recipe's steps out, one after another, on a model and data.

    Args:
        recipe: a recipe, or its name.
        model: a module, a folder, a Hub id or a shipped model; left as found. Or the dotted name of a network of
            `neurograft.networks`, which is made with the options that the recipe gives it.
        data: for every step that takes data; the requests of a step that edits.
        changes: options of the recipe by name, and arguments of its steps as "tune.args" or "locate.limit".
        processing_class: for raw data.
        revision: of a Hub id.
        dtype: load the weights so.
        device_map: as for `from_pretrained`.
        seed: given to every step that takes one.
        **given: more of the state by name, e.g. `requests=` or `eval_dataset=`; the steps that have such an
            argument get it.

    Returns:
        Every result by name; the graft's card names the recipe and its options.

    Raises:
        RequestError: an unknown recipe, option, step or argument.
    """
    plan = changed(recipe, changes or {})
    net = load_model(network(model, plan), revision=revision, dtype=dtype, device_map=device_map)
    state: dict[str, Any] = {"model": net, "data": data, "requests": data, "where": None, **given}
    common = state["common"] = {"processing_class": processing_class, "seed": seed}  # for steps that are no verbs
    used: set[str] = set()
    for step in plan.steps:
        do, arguments = step["do"], {k: v for k, v in step.items() if k not in ("do", "as", "on")}
        if "." in do:
            state |= {k: _signed(v, plan) for k, v in (resolve(do)(state, **arguments) or {}).items()}
            continue
        names, result = GIVEN[do]
        verb = resolve(f"neurograft.pipeline.{do}")
        known = option_names(verb)
        arguments = {k: _referred(v, state) for k, v in arguments.items()}
        extra = {k: v for k, v in {**common, **given}.items() if k in known and k not in arguments and v is not None}
        used |= extra.keys()
        # A step may name its own data or selection instead of the run's.
        first = [arguments.pop(n) if n in arguments else state[n] for n in names]
        ship = arguments.pop("ship", SHIPS[0])
        used |= {n for n in _listed(step.get("on")) if n in given}
        with _under(step.get("on"), state):
            made = verb(*first, **arguments, **extra)
            if do == "intervene":
                made = made.fold() if ship == "weights" else made.graft()
        state[step.get("as", result)] = _signed(made, plan)
    unused = [k for k in given if k not in used and all(k not in names for names, _ in GIVEN.values())]
    if unused:
        raise RequestError(
            f"{', '.join(unused)}, which no step of {plan.name} takes",
            expected="arguments of its steps",
            do="leave them out, or set them at a step: changes={'tune.args': ...}",
        )
    return Outcome({k: v for k, v in state.items() if k not in ("model", "data", "requests", "common")})


def _signed(made: Any, plan: Recipe) -> Any:
    """Name the recipe on a graft's card."""
    return replace(made, card={**made.card, "recipe": plan.as_dict()}) if isinstance(made, Graft) else made


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


@contextmanager
def _under(names: str | Sequence[str] | None, state: Mapping[str, Any]) -> Iterator[None]:
    """Put the grafts on the model that a step stands on."""
    with ExitStack() as stack:
        for name in _listed(names):
            graft = state.get(name)
            if not isinstance(graft, Graft):
                raise RequestError(
                    f"a step on top of {name!r}, which is no graft",
                    expected="a graft of an earlier step, or one that was given",
                    do=f"pass {name}=graft to run",
                )
            stack.enter_context(graft.on(state["model"]))
        yield


def changed(found: Recipe | str, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with its options and its steps' arguments changed.

    Raises:
        RequestError: a step the recipe does not have, or options for a recipe made already.
    """
    options = {k: v for k, v in changes.items() if "." not in k}
    if isinstance(found, str):
        found = recipe(found, **options)
    elif options:
        raise RequestError(
            f"the options {', '.join(options)} for a recipe made already",
            expected="arguments of its steps, such as 'tune.args'",
            do=f"make it with them: ng.recipe({found.name!r}, {next(iter(options))}=...)",
        )
    for key, value in changes.items():
        if "." in key:
            found = _set(found, key, value)
    return found


def _set(found: Recipe, key: str, value: Any) -> Recipe:
    """Change an argument in every step of a verb, or of a function by its last name: each keeps its other arguments."""
    called = {name: s["do"] for s in found.steps for name in (s["do"], s["do"].rpartition(".")[2])}
    do = max((name for name in called if key.startswith(f"{name}.")), key=len, default=None)
    if do is None:
        raise RequestError(
            f"a change of the step {key.partition('.')[0]!r} of {found.name}",
            expected=f"one of {', '.join(dict.fromkeys(s['do'].rpartition('.')[2] for s in found.steps))}",
            do="change a step the recipe has",
        )
    first, _, rest = key[len(do) + 1 :].partition(".")
    function = resolve(called[do] if "." in called[do] else f"neurograft.pipeline.{do}")
    known = option_names(function)
    loose = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    mine = [s for s in found.steps if s["do"] == called[do]]
    if first not in known and not loose and not any(first in s for s in mine):
        raise RequestError(
            f"the argument {first!r} of {do}", expected=f"one of {', '.join(known)}", do=near(first, known)
        )
    steps = [{**s, first: _within(s.get(first), rest, value, key)} if s["do"] == called[do] else s for s in found.steps]
    return replace(found, steps=tuple(steps))


def _within(before: Any, rest: str, value: Any, key: str) -> Any:
    """Return an argument's new value; "args.max_steps" reaches into a dict, "by.mask" into a choice's options."""
    if not rest:
        return value
    if isinstance(before, (tuple, list)) and len(before) == 2 and isinstance(before[1], Mapping):
        return (before[0], {**before[1], rest: value})
    if before is not None and not isinstance(before, Mapping):
        raise RequestError(
            f"a change of {key}, within {before!r}",
            expected="something with names inside",
            do=f"give {key[: -len(rest) - 1]} as a whole",
        )
    return {**(before or {}), rest: value}


def _referred(value: Any, state: Mapping[str, Any]) -> Any:
    """Replace "$name" by what an earlier step made, also inside the options of a choice."""
    if isinstance(value, (tuple, list)):
        return type(value)(_referred(v, state) for v in value)
    if isinstance(value, Mapping):
        return {k: _referred(v, state) for k, v in value.items()}
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    if value[1:] not in state:
        raise RequestError(
            f"the reference {value!r} of a step", expected="an earlier result", do=near(value[1:], state)
        )
    return state[value[1:]]


FILE = ("recipe", "name", "steps", "paper", "model", "data", "options", "changes")


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
    if "recipe" in text:
        return text["recipe"], text
    if "steps" not in text:
        raise RequestError(f"{path} without recipe or steps", expected="one of them", do="write recipe: NAME")
    return Recipe(text.get("name", path.stem), tuple(text["steps"]), text.get("paper")), text
