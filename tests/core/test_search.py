"""The search: what was tried is looked up, ties go to the first, what is no number is refused."""

import pytest
import torch

from neurograft.core.errors import RequestError, RunError
from neurograft.core.numerics.search import search, uniform
from neurograft.core.seeds import generator
from neurograft.core.selection import Scores
from neurograft.core.units import Site
from neurograft.selectors.depth import depth


def test_a_point_proposed_again_is_not_tried_again():
    asked = []

    def fitness(point):
        asked.append(point)
        return -abs(float(point) - 2)

    found = search(
        torch.tensor([[0.0], [2.0]]), fitness, lambda f, g: f.best[None], rounds=3, generator=generator(0, "g")
    )
    assert found.tries == len(asked) == 2
    assert found.fitness.tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0]
    assert found.incumbents.tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0]
    assert found.ranked().tolist() == [1, 0]
    assert float(found.best) == 2.0


def test_the_same_seed_tries_the_same_points_and_bounds_hold():
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 3.0])
    runs = [
        search(low[None], lambda p: float(p.sum()), uniform(low, high), rounds=9, generator=generator(4, "g")).points
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert bool((runs[0] >= low).all() and (runs[0] <= high).all())


def test_what_is_no_search_is_refused():
    one, rng = torch.zeros(1, 2), generator(0, "g")
    with pytest.raises(RequestError, match="at least one candidate"):
        search(torch.zeros(0, 2), float, uniform(one[0], one[0] + 1), rounds=1, generator=rng)
    with pytest.raises(RunError, match="fitness of nan"):
        search(one, lambda p: float("nan"), uniform(one[0], one[0] + 1), rounds=1, generator=rng)
    with pytest.raises(RunError, match="over 2 numbers"):
        search(one, lambda p: 0.0, lambda f, g: torch.zeros(1, 3), rounds=1, generator=rng)


def test_depth_counts_blocks_by_their_middle():
    sites = {f"{i}": Site(f"{i}", "head", 2, layer=i) for i in range(5)}
    scores = Scores(sites, {n: torch.zeros(2) for n in sites})
    taken = [n for n, ids in depth(scores).ids.items() if len(ids)]
    assert taken == ["0", "1"]  # the third block's middle is the middle
    assert [n for n, ids in depth(scores, start=0.5, stop=1.0).ids.items() if len(ids)] == ["2", "3", "4"]
    for wrong in ({"stop": 0.05}, {"start": 0.6}, {"stop": 1.5}):
        with pytest.raises(RequestError, match="of 5 blocks"):
            depth(scores, **wrong)
