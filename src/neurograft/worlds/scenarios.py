"""Scenarios in words, put together from roles, choices and attributes."""

from __future__ import annotations

import torch

from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator
from neurograft.worlds._scenario_words import CHOICES, ROLES
from neurograft.worlds.preferences import Attribute, Scenario


def scenarios(count: int = 100, *, attributes: int = 5, seed: int = 0) -> list[Scenario]:
    """Draw scenarios that no two share role and choice: "Imagine you are a beekeeper. You are looking for a flat ...".

    Args:
        count: how many; up to 800.
        attributes: K of each, 2 to 6, drawn from those its choice has.
        seed: names the draw.

    Raises:
        RequestError: more scenarios or attributes than there are words for.

    Example:
        >>> found = scenarios(3)
        >>> len(found), len(found[0].attributes), len({s.name for s in found})
        (3, 5, 3)
    """
    most, fewest = len(ROLES) * len(CHOICES), min(len(a) for a in CHOICES.values())
    if not 1 <= count <= most or not 2 <= attributes <= fewest:
        raise RequestError(
            f"{count} scenarios of {attributes} attributes",
            expected=f"1 to {most} scenarios of 2 to {fewest} attributes",
            do="ask for fewer, or write scenarios of your own into a JSONL file",
        )
    rng, names, found = generator(seed, "scenarios"), list(CHOICES), []
    for pick in torch.randperm(most, generator=rng)[:count].tolist():
        role, choice = ROLES[pick // len(names)], names[pick % len(names)]
        listed = CHOICES[choice]
        kept = sorted(torch.randperm(len(listed), generator=rng)[:attributes].tolist())
        parts = tuple(Attribute(name, low, high, units) for name, units, low, high in (listed[k] for k in kept))
        question = f"Imagine you are {role}. You are looking for {choice}. Which of these two do you take?"
        found.append(Scenario(f"{role}: {choice}", question, parts))
    return found
