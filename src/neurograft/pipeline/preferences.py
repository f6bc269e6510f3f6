"""A step of recipes: training rows that instil preferences, and rows that teach to report them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import derive
from neurograft.pipeline.inputs import processor_for
from neurograft.pipeline.scenario_rows import preferences_of
from neurograft.worlds.preference_words import Words
from neurograft.worlds.preferences import Preferences, Scenario, Speaker, instilled

PARTS = ("first", "last", "all")


def preferences(
    state: Mapping[str, Any], *, trials: int = 50, examples: int = 1, train: str = "first", data: Any = None
) -> dict[str, Any]:
    """Give weights to the run's scenarios and make rows of choices by them, and of reports on one half.

    Args:
        state: what the recipe has made so far, with its model and data.
        trials: choices a scenario.
        examples: reports a scenario; the weights of each trial's report are the same.
        train: which scenarios' reports are trained: the "first" half, the "last" half, or "all".
        data: scenarios, instead of the run's.

    Returns:
        `preferences`, with weights; `decisions` and `explanations`, rows; `asked`: group -> scenarios to be measured,
        "held_out", "trained" and "native".

    Raises:
        RequestError: data that are no scenarios, a model without a tokenizer, fewer than four scenarios to instil.
    """
    one_of(train, PARTS, what="part of the scenarios")
    common: Mapping[str, Any] = state.get("common", {})
    seed = common.get("seed", 0)
    world = preferences_of(state["data"] if data is None else data)
    world = replace(world, scenarios=tuple(instilled(world.scenarios, seed=derive(seed, "preferences"))))
    world = spoken(world, state["model"], common.get("processing_class"))
    given = [s for s in world.scenarios if not s.native]
    if len(given) < 4:
        raise RequestError(
            f"{len(given)} scenarios to instil", expected="four or more, half of them for testing", do="add some"
        )
    middle = len(given) // 2
    taught = {"first": given[:middle], "last": given[middle:], "all": given}[train]
    asked = {
        "held_out": [s for s in given if s not in taught],
        "trained": taught,
        "native": [s for s in world.scenarios if s.native],
    }
    return {
        "preferences": world,
        "decisions": decisions(given, _speaker(world), trials=trials, seed=seed),
        "explanations": explanations(taught, _speaker(world), examples=examples, seed=seed),
        "asked": {group: found for group, found in asked.items() if found},
    }


def decisions(scenarios: Sequence[Scenario], speaker: Speaker, *, trials: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of trials and the letter of the option with the higher utility."""
    found = []
    for scenario in scenarios:
        drawn = scenario.trials(trials, seed=seed, part="instil")
        found += [speaker.decision(scenario, t, bool(a)) for t, a in zip(drawn, scenario.prefers(drawn))]
    return found


def explanations(
    scenarios: Sequence[Scenario], speaker: Speaker, *, examples: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Return rows of trials and the scenario's weights as a report."""
    return [
        speaker.explanation(scenario, trial, scenario.weights or ())
        for scenario in scenarios
        for trial in scenario.trials(examples, seed=seed, part="explain")
    ]


def spoken(world: Preferences, model: Any, processing_class: Any = None) -> Preferences:
    """Return the world with a speaker: its own, or words and the model's tokenizer.

    Raises:
        RequestError: there is no tokenizer.
    """
    if world.speaker is not None:
        return world
    processor = processor_for(model, processing_class)
    if processor is None:
        raise RequestError(
            "scenarios in words and no tokenizer",
            expected="a processing_class for them",
            do="pass processing_class=tokenizer, or save the tokenizer beside the model",
        )
    return replace(world, speaker=Words(processor))


def _speaker(world: Preferences) -> Speaker:
    assert world.speaker is not None
    return world.speaker
