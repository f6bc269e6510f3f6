"""`run`: carry a recipe out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurograft.core.choose import Chosen, asked, option_names
from neurograft.core.errors import RequestError, near
from neurograft.core.grafts.graft import Graft
from neurograft.core.resolve import resolve
from neurograft.core.selection import Scores, Selection
from neurograft.pipeline._network import network
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.recipe import SHIPS, VERBS, Recipe
from neurograft.pipeline.recipe_file import Trust, opened

WORDS = ("do", "as", "on")  # of a step itself; the others are arguments


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
    recipe: Recipe | str | Path,
    model: Model | None = None,
    data: Any = None,
    *,
    changes: Mapping[str, Any] | None = None,
    trust: Trust = (),
    processing_class: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    seed: int = 0,
    **given: Any,
) -> Outcome:
    """Carry a recipe's steps out, one after another, on a model and data.

    Args:
        recipe: a recipe, its name, or a YAML or JSON file of one.
        model: a module, a folder, a Hub id or a shipped model; left as found. Or the dotted name of a network of
            `neurograft.networks`, which is made with the options that the recipe gives it. What a file names if None.
        data: for every step that takes data; the requests of a step that edits. What a file names if None.
        changes: options of the recipe by name, and arguments of its steps as "tune.args" or "locate.limit".
        trust: packages, or dotted names, whose code a recipe file may call; without it a file is data, and names
            methods of neurograft alone. What you name yourself, here or in a recipe of your own making, is yours.
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
        RequestError: an unknown recipe, option, step or argument; no model; a file that names code nobody trusts.
    """
    with opened(recipe, changes or {}, trust) as found:
        plan, model = found.recipe, found.model if model is None else model
        if model is None:
            raise RequestError(
                f"the recipe {plan.name} and no model", expected="a model", do="name it behind the recipe"
            )
        net = load_model(network(model, plan), revision=revision, dtype=dtype, device_map=device_map)
        common = {"processing_class": processing_class, "seed": seed}
        return _carried_out(plan, net, found.data if data is None else data, common, given)


def _carried_out(
    plan: Recipe, net: nn.Module, data: Any, common: Mapping[str, Any], given: Mapping[str, Any]
) -> Outcome:
    state: dict[str, Any] = {"model": net, "data": data, "requests": data, "where": None, **given}
    state["common"] = common  # for steps that are no verbs
    used: set[str] = set()
    for step in plan.steps:
        if "." in step["do"]:
            arguments = {k: v for k, v in step.items() if k not in WORDS}
            state |= {k: _signed(v, plan) for k, v in _called(step["do"], state, arguments).items()}
        else:
            name = step.get("as", VERBS[step["do"]][1])
            state[name] = _signed(_made(step, plan.name, state, {**common, **given}, used), plan)
    unused = [k for k in given if k not in used and all(k not in names for names, _ in VERBS.values())]
    if unused:
        raise RequestError(
            f"{', '.join(unused)}, which no step of {plan.name} takes",
            expected="arguments of its steps",
            do="leave them out, or set them at a step: changes={'tune.args': ...}",
        )
    return Outcome({k: v for k, v in state.items() if k not in ("model", "data", "requests", "common")})


def _made(
    step: Mapping[str, Any], recipe: str, state: Mapping[str, Any], given: Mapping[str, Any], used: set[str]
) -> Any:
    """Return what the verb of a step makes; what it was given beside the state is added to `used`."""
    do = step["do"]
    names, verb = VERBS[do][0], resolve(f"neurograft.pipeline.{do}")
    known = option_names(verb)
    arguments = {k: _referred(v, state) for k, v in step.items() if k not in WORDS}
    extra = {k: v for k, v in given.items() if k in known and k not in arguments and v is not None}
    used |= extra.keys() | {n for n in _listed(step.get("on")) if n in given}
    # A step may name its own data or selection instead of the run's.
    lacking = [n for n in names if n not in arguments and n not in state]
    if lacking:
        raise RequestError(
            f"the step {do!r} of {recipe} before anything made its {lacking[0]}",
            expected="a step before it that does",
            do=f"put one before it, or give {lacking[0]} at the step",
        )
    first = [arguments.pop(n) if n in arguments else state[n] for n in names]
    ship = arguments.pop("ship", SHIPS[0])
    _check_names(verb, arguments, do)
    with _under(step.get("on"), state):
        made = verb(*first, **arguments, **extra)
        if do == "intervene":
            return made.fold() if ship == "weights" else made.graft()
    return made


def _called(do: str, state: dict[str, Any], arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a step that is no verb adds to the state."""
    function = asked(do)
    _check_names(function, arguments, do)
    made = Chosen(function, arguments, do, "steps")(state) or {}
    if not isinstance(made, Mapping):
        raise RequestError(
            f"the step {do!r}, which returned a {type(made).__name__}",
            expected="a verb, or a function (state, **arguments) -> more of the state",
            do="name another, or let it return a mapping",
        )
    return made


def _check_names(verb: Any, arguments: Mapping[str, Any], do: str) -> None:
    parameters = inspect.signature(verb).parameters
    odd = [n for n in arguments if n not in parameters]
    if odd and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise RequestError(
            f"the argument {odd[0]!r} of {do}", expected=f"one of {', '.join(parameters)}", do=near(odd[0], parameters)
        )


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
