"""Searches without a gradient: candidates, their fitness, the best one.

A candidate is a point, [n] float64 (a selection as bits, angles); what proposes the next ones is a function of what
has been seen, so one loop serves random search, Bayesian optimisation and evolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neurograft.core.errors import RequestError, RunError


@dataclass
class Found:
    """What a search has seen, in the order in which it was tried; more fitness is better.

    Args:
        points: candidates [m, n], float64.
        fitness: of each, [m], float64.
        tries: how often a fitness was computed; a point proposed again is looked up.
    """

    points: Tensor
    fitness: Tensor
    tries: int = 0
    _known: dict[bytes, float] = field(default_factory=dict, repr=False)

    @property
    def best(self) -> Tensor:
        """The fittest candidate, the first one of equals, [n]."""
        return self.points[int(self.fitness.argmax())]

    @property
    def incumbents(self) -> Tensor:
        """The best fitness so far after each try, [m]; never falls."""
        return self.fitness.cummax(0).values

    def ranked(self) -> Tensor:
        """Return the numbers of the distinct candidates, the fittest first, earlier ones before equals."""
        order = torch.sort(self.fitness, descending=True, stable=True).indices.tolist()
        first: dict[bytes, int] = {}
        for i in order:
            first.setdefault(key_of(self.points[i]), i)
        return torch.tensor(list(first.values()))


Propose = Callable[[Found, torch.Generator], Tensor]


def search(
    first: Tensor,
    fitness: Callable[[Tensor], float],
    propose: Propose,
    *,
    rounds: int,
    generator: torch.Generator,
) -> Found:
    """Try the first candidates, then what is proposed of everything seen, round after round.

    Args:
        first: candidates to begin with, [m, n].
        fitness: of a candidate [n]; a number, more is better, the same whenever it is asked for.
        propose: (found, generator) -> the next candidates, [k, n].
        rounds: how often it is asked.
        generator: for the proposals.

    Returns:
        Everything seen.

    Raises:
        RequestError: nothing to begin with, or fewer than 0 rounds.
        RunError: a fitness that is no number, or proposals of another shape.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> near = lambda x: -float((x - 0.3).abs().sum())
        >>> found = search(torch.zeros(1, 1), near, uniform(torch.zeros(1), torch.ones(1)), rounds=50, generator=rng)
        >>> found.tries, abs(float(found.best) - 0.3) < 0.05
        (51, True)
    """
    if first.dim() != 2 or not len(first) or rounds < 0:
        raise RequestError(
            f"a search from candidates of shape {tuple(first.shape)} over {rounds} rounds",
            expected="at least one candidate [m, n], and 0 or more rounds",
            do="give candidates to begin with",
        )
    wide = first.shape[1]
    found = Found(torch.zeros(0, wide, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    _try(found, first, fitness)
    for _ in range(rounds):
        new = propose(found, generator)
        if new.dim() != 2 or new.shape[1] != wide or not len(new):
            raise RunError(f"proposals of shape {tuple(new.shape)} in a search over {wide} numbers")
        _try(found, new, fitness)
    return found


def _try(found: Found, points: Tensor, fitness: Callable[[Tensor], float]) -> None:
    for point in points.detach().to("cpu", torch.float64):
        key = key_of(point)
        if key not in found._known:
            value = float(fitness(point.clone()))
            if not math.isfinite(value):
                raise RunError(f"a fitness of {value} after {found.tries} tries: candidates cannot be ordered by it")
            found._known[key] = value
            found.tries += 1
        found.points = torch.cat([found.points, point[None]])
        found.fitness = torch.cat([found.fitness, torch.tensor([found._known[key]], dtype=torch.float64)])


def key_of(point: Tensor) -> bytes:
    """Return what tells two candidates apart."""
    return point.contiguous().numpy().tobytes()


def uniform(low: Tensor, high: Tensor) -> Propose:
    """Return random search: one point a round, uniform between the bounds [n]."""

    def propose(found: Found, generator: torch.Generator) -> Tensor:
        return drawn(low, high, 1, generator)

    return propose


def drawn(low: Tensor, high: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return uniform points between the bounds, [count, n], float64."""
    share = torch.rand(count, len(low), generator=generator, dtype=torch.float64)
    return low.double() + share * (high.double() - low.double())
