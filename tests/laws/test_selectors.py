"""Laws of the room `selectors`, over every method found in its folder that takes a quota."""

import tracemalloc

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose, methods, option_names
from neurograft.core.compact.meter import Peak
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores, Selection
from neurograft.core.units import Part, Site
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


def by_sorting(scores, key, per, *, highest=None, q=None):
    """Slow twin: the places that a stable sort of each group takes, or those at or above its quantile."""
    groups, first = {}, 0
    for name, site in scores.sites.items():
        for unit in range(site.n):
            row = unit // site.parts[0].units[1][0]
            group = {"global": 0, "layer": site.layer, "site": name, "row": (name, row)}[per]
            groups.setdefault(group, []).append(first + unit)
        first += site.n
    found = []
    for places in groups.values():
        if q is None:
            found += sorted(places, key=lambda p: (-key[p], p))[: max(1, int(highest * len(places) + 0.5))]
        else:
            bar = sorted(key[p] for p in places)[min(int(q * len(places)), len(places) - 1)]
            found += [p for p in places if key[p] >= bar]
    return sorted(found)


def some_weights(seed):
    """Matrices of unlike shapes in layers out of order, many of their scores equal, zeros of both signs among them."""
    rng = torch.Generator().manual_seed(seed)
    shapes, layers = [(3, 5), (2, 4), (5, 1), (1, 6)], [1, None, 0, 1]
    sites = {
        f"{i}": Site(f"{i}", "weight", r * c, (Part("w", ((r, c), (c, 1))),), layer=layer)
        for i, ((r, c), layer) in enumerate(zip(shapes, layers))
    }
    drawn = {n: torch.randint(-2, 3, (s.n,), generator=rng) * (0.5 if s.layer else -1.0) for n, s in sites.items()}
    return Scores(sites, drawn)


def places(found):
    ends = torch.tensor([0, *(s.n for s in found.sites.values())]).cumsum(0).tolist()
    return [end + i for end, ids in zip(ends, found.ids.values()) for i in ids.tolist()]


@pytest.mark.parametrize("per", ["global", "layer", "site", "row"])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_taken_is_what_sorting_would_take(per, seed):
    scores = some_weights(seed)
    key = torch.cat(list(scores.values.values())).tolist()
    for share in (0.01, 0.3, 0.5, 1.0):
        assert places(scores.top(fraction=share, per=per)) == by_sorting(scores, key, per, highest=share)
        low = by_sorting(scores, [-k for k in key], per, highest=share)
        assert places(scores.bottom(fraction=share, per=per)) == low
    for q in (0.0, 0.4, 0.9):
        assert places(choose("selectors", "quantile", q=q, per=per)(scores)) == by_sorting(scores, key, per, q=q)
    every = dict(enumerate(key))
    for most in (1, 7, 20):
        best = sorted(sorted(every, key=lambda p: (-every[p], p))[:most])
        assert places(choose("selectors", "threshold", above=-9.0, most=most)(scores)) == best
        assert places(choose("selectors", "threshold", above=9.0, least=most)(scores)) == best
    for lowest in (False, True):
        found = choose("selectors", "lora_budget", r=1, lowest=lowest)(scores)
        for name, value in scores.values.items():
            (high, _), (wide, _) = scores.sites[name].parts[0].units
            order = sorted(range(len(value)), key=lambda i: (float(value[i]) * (1 if lowest else -1), i))
            assert found.ids[name].tolist() == sorted(order[: high + wide])


@pytest.mark.parametrize("per", ["global", "layer", "site", "row"])
@pytest.mark.parametrize(("name", "options"), [("top", {"fraction": 0.1}), ("quantile", {"q": 0.9})])
def test_no_order_of_all_weights_is_held(name, options, per):
    # An order is int64, and sorting by group holds several: it was 44 bytes a weight.
    shape, sites = (64, 512), {}
    for i in range(8):
        part = Part("w", ((shape[0], shape[1]), (shape[1], 1)))
        sites[f"{i}"] = Site(f"{i}", "weight", part.n, (part,), layer=i)
    scores = Scores(sites, {n: torch.rand(s.n, generator=torch.Generator().manual_seed(0)) for n, s in sites.items()})
    for _ in range(2):  # the first time round it is imports, and the digest of the scores
        tracemalloc.start()
        try:
            with Peak() as meter:
                choose("selectors", name, **options, per=per)(scores)
            beside = tracemalloc.get_traced_memory()[1]  # numpy's copies
        finally:
            tracemalloc.stop()
    assert meter.peak + beside < 18 * sum(s.n for s in sites.values())
