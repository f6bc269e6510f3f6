"""Preference worlds: choices between two options whose attributes are weighed by known, never mentioned weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator

LARGEST = 100  # of a weight, either way


@dataclass(frozen=True)
class Attribute:
    """One thing in which options differ.

    Args:
        name: in words; the key of its weight in a report.
        low: the least value.
        high: the largest value.
        units: in words.
        decimals: of values; None for as many as the range needs: none from 5 on, one from 1 on, else enough to see.

    Example:
        >>> Attribute("rent", 500, 2500).places, Attribute("rating", 1, 5).places, Attribute("share", 0, 0.05).places
        (0, 1, 3)
    """

    name: str
    low: float
    high: float
    units: str = ""
    decimals: int | None = None

    @property
    def places(self) -> int:
        """Digits behind the point."""
        if self.decimals is not None:
            return self.decimals
        span = self.high - self.low
        return 0 if span >= 5 else 1 if span >= 1 else abs(math.floor(math.log10(span))) + 1


@dataclass(frozen=True)
class Scenario:
    """A role, a choice, and K attributes.

    Args:
        name: names its weights and trials; unlike any other scenario's.
        question: who chooses what, in words.
        attributes: K of them.
        weights: what each attribute counts, from -100 to 100, or None where nobody knows.
        native: the weights are the model's own: nothing is instilled and no report is trained.

    Example:
        >>> s = Scenario("pens", "Which pen?", (Attribute("price", 0, 10), Attribute("length", 5, 15)), (-100, 50))
        >>> s.utilities(torch.tensor([[[2.0, 10.0], [8.0, 15.0]]])).tolist()
        [[5.0, -30.0]]
    """

    name: str
    question: str
    attributes: tuple[Attribute, ...]
    weights: tuple[float, ...] | None = None
    native: bool = False

    def trials(self, count: int, *, seed: int = 0, part: str = "") -> Tensor:
        """Return pairs of options, every value uniform in its range and rounded, float64 [count, 2, K].

        Args:
            count: trials.
            seed: with the scenario's name and `part`, names the draw.
            part: tells draws for different purposes apart.
        """
        rng = generator(seed, "trials", self.name, part)
        drawn = torch.rand(count, 2, len(self.attributes), dtype=torch.float64, generator=rng)
        values = [
            torch.round(drawn[..., k] * (a.high - a.low) + a.low, decimals=a.places)
            for k, a in enumerate(self.attributes)
        ]
        return torch.stack(values, -1)

    def shares(self, values: Tensor) -> Tensor:
        """Return (x - low) / (high - low) of each value [..., K]."""
        low, high = (torch.tensor([getattr(a, f) for a in self.attributes]).double() for f in ("low", "high"))
        return (values - low) / (high - low)

    def utilities(self, values: Tensor) -> Tensor:
        """Return u = sum_k w_k (x_k - low_k) / (high_k - low_k) of options [..., K].

        Raises:
            RequestError: the weights are not known.
        """
        if self.weights is None:
            raise RequestError(
                f"the utilities of {self.name!r}, whose weights are not known",
                expected="a scenario with weights",
                do="draw them with `instilled`, or write `weights` into its row",
            )
        return self.shares(values) @ torch.tensor(self.weights).double()

    def prefers(self, trials: Tensor) -> Tensor:
        """Return whether A has the higher utility in trials [n, 2, K]; a tie goes to B. Boolean [n]."""
        utilities = self.utilities(trials)
        return utilities[:, 0] > utilities[:, 1]


class Speaker(Protocol):
    """How trials are put to a model and its answers are read; text and tokens are two ways."""

    length: int  # tokens a report may take

    def decide(self, scenario: Scenario, trial: Tensor) -> list[int]:
        """Return the tokens that ask for a choice."""

    def explain(self, scenario: Scenario, trial: Tensor) -> list[int]:
        """Return the tokens that ask for a report."""

    def letters(self) -> tuple[int, int]:
        """Return the tokens with which the answers "A" and "B" begin."""

    def decision(self, scenario: Scenario, trial: Tensor, a: bool) -> dict[str, Any]:
        """Return a training row: a choice and its answer."""

    def explanation(self, scenario: Scenario, trial: Tensor, weights: Sequence[float]) -> dict[str, Any]:
        """Return a training row: a request for a report, and the report."""

    def read(self, scenario: Scenario, tokens: list[int]) -> list[float] | str:
        """Return the K weights of a reply, or why it is no report."""

    def spell(self, tokens: list[int]) -> str:
        """Return a reply as people read it."""


@dataclass(frozen=True)
class Preferences:
    """Scenarios and how they are put to a model.

    Args:
        scenarios: at least one.
        speaker: None where the model's own tokenizer is to be used.
    """

    scenarios: tuple[Scenario, ...]
    speaker: Speaker | None = None


def instilled(scenarios: Sequence[Scenario], *, seed: int = 0) -> list[Scenario]:
    """Give weights to the scenarios that have none and are not native: uniform in [-100, 100], scaled so that the
    largest is 100 either way, rounded.

    Args:
        scenarios: any.
        seed: with a scenario's name, names its weights.

    Example:
        >>> pens = Scenario("pens", "Which pen?", (Attribute("price", 0, 10), Attribute("length", 5, 15)))
        >>> (made,) = instilled([pens])
        >>> max(abs(w) for w in made.weights), made.weights == instilled([pens])[0].weights
        (100.0, True)
    """
    found = []
    for one in scenarios:
        if one.weights is None and not one.native:
            rng = generator(seed, "weights", one.name)
            drawn = torch.rand(len(one.attributes), dtype=torch.float64, generator=rng) * 2 - 1
            scaled = (drawn / drawn.abs().max() * LARGEST).round()
            one = replace(one, weights=tuple(scaled.tolist()))
        found.append(one)
    return found
