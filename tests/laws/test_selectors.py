"""Laws of the room `selectors`, over every method found in its folder that takes a quota."""

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose, methods, option_names
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.worlds.pico import pico

QUOTA = {"fraction", "count", "per"}
# what a selector needs beside scores, at the setting at which it restricts nothing
NEEDED = {
    "outside": lambda scores: {"of": Selection.of(scores.sites, {})},
    "vote": lambda scores: {"ballots": [scores]},
}
NAMES = [n for n in methods("selectors") if option_names(choose("selectors", n).function).keys() >= QUOTA]


def taken(name, scores, **quota):
    return choose("selectors", name, **NEEDED.get(name, lambda scores: {})(scores), **quota)(scores)


@pytest.fixture(scope="module")
def scores():
    found = sites(pico("llama"), "neuron")  # two layers of 48
    drawn = torch.randn(96, generator=torch.Generator().manual_seed(0))
    return Scores(found, dict(zip(found, drawn.split(48))))


def test_methods_are_found():
    assert {"top", "bottom", "random"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("quota", "counts"),
    [({"count": 7}, None), ({"count": 7, "per": "layer"}, [7, 7]), ({"count": 3, "per": "site"}, [3, 3]),
     ({"fraction": 0.25}, None), ({"fraction": 0.25, "per": "layer"}, [12, 12])],
)  # fmt: skip
def test_exactly_as_many_as_asked_for_sorted_each_once_the_same_again(name, quota, counts, scores):
    before = {n: v.clone() for n, v in scores.values.items()}
    found, again = (taken(name, scores, **quota) for _ in range(2))
    assert len(found) == (sum(counts) if counts else quota.get("count", 24))
    assert counts is None or list(found.counts().values()) == counts
    for ids in found.ids.values():
        assert ids.tolist() == sorted(set(ids.tolist()))
    assert found.digest == again.digest
    assert all(torch.equal(v, before[n]) for n, v in scores.values.items())


@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_the_lower_unit_number(name, scores):
    if "seed" in option_names(choose("selectors", name).function):
        return  # it draws
    flat = Scores(scores.sites, {n: torch.ones(48) for n in scores.sites})
    found = taken(name, flat, count=2, per="layer")
    assert [ids.tolist() for ids in found.ids.values()] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quota", [{"fraction": 1.5}, {"count": 0}, {"count": 97}, {"per": "floor", "count": 1}])
def test_quotas_that_cannot_be_met_are_refused(name, quota, scores):
    with pytest.raises(RequestError):
        taken(name, scores, **quota)
