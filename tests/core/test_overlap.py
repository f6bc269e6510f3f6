"""Where regions meet and what one leaves of another, against sets of entries."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neurograft.core.grafts.combined import combined
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.ledger import Ledger
from neurograft.core.overlap import meeting, parted, shared, together
from neurograft.core.region import Region, union
from neurograft.core.seeds import generator

SHAPES = {"matrix": (6, 8), "bank": (3, 4, 6), "vector": (9,)}


def regions(shape):
    """Every layout that fits a shape, a bank also as one matrix, with some ids, none and all of them."""
    rng, made = generator(len(shape), "overlap"), [Region.of(shape, "all")]
    matrices = [None, (1, shape[0], 24)] if len(shape) == 3 else [None]
    for matrix, layout in itertools.product(matrices, ["rows", "cols", "flat"] if len(shape) > 1 else ["flat"]):
        total = Region.of(shape, layout, matrix=matrix).total
        made.append(Region.of(shape, layout, torch.randperm(total, generator=rng)[: max(1, total // 3)], matrix=matrix))
    made += [Region.of(shape, "flat"), Region.of(shape, "flat", range(made[0].numel))]
    if len(shape) == 2:
        made += [Region.of(shape, "block", ids, block=block) for ids, block in (([0, 3, 5], (2, 4)), ([1, 2], (3, 2)))]
    return made


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_two_regions_share_and_what_is_left(shape):
    weight = torch.randn(shape, generator=generator(0, "weight"))
    for a, b in itertools.product(regions(shape), repeat=2):
        mine, theirs, run = meeting(a, b)
        held = [torch.arange(r.numel).view(-1, run)[i].reshape(-1) for r, i in ((a, mine), (b, theirs))]
        assert all(torch.equal(one, other) for one, other in zip(held, shared(a, b)))
        here, there = (r.flat()[i] for r, i in zip((a, b), held))
        assert torch.equal(here, there)
        assert set(here.tolist()) == set(a.flat().tolist()) & set(b.flat().tolist())
        inside, rest = parted((a, a.read(weight)), b)
        for piece, entries in ((inside, set(here.tolist())), (rest, set(a.flat().tolist()) - set(here.tolist()))):
            if piece is None:
                assert not entries
                continue
            region, values = piece
            assert set(region.flat().tolist()) == entries
            assert torch.equal(values, region.read(weight))
            assert region.ids.tolist() == sorted(region.ids.tolist())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_disjoint_pieces_are_put_together_in_order(shape):
    weight = torch.randn(shape, generator=generator(0, "weight"))
    for a, b in itertools.product(regions(shape)[1:], repeat=2):
        _, rest = parted((b, b.read(weight)), a)
        pieces = together([p for p in (rest, (a, a.read(weight))) if p])
        assert set().union(*(r.flat().tolist() for r, _ in pieces)) == {*a.flat().tolist(), *b.flat().tolist()}
        assert all(torch.equal(values, region.read(weight)) for region, values in pieces)
        assert all(region.ids.tolist() == sorted(region.ids.tolist()) for region, _ in pieces)


def test_a_union_of_regions_that_read_a_weight_as_other_matrices():
    shape = (6, 4, 3)
    one, bank = Region.of(shape, "rows", [2], matrix=(1, 6, 12)), Region.of(shape, "rows", [2])
    assert union([one, bank]).flat().tolist() == [6, 7, 8, *range(24, 36)]
    assert not one.contains(bank)
    assert one.contains(Region.of(shape, "rows", [9]))


class Counted(TorchDispatchMode):
    """Counts the numbers that operations make, views not included."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            self.made += found.numel() if found.untyped_storage().data_ptr() not in given else 0
        return found


@pytest.mark.parametrize("layout", ["rows", "cols", "flat"])
def test_what_a_graft_costs_that_comes_or_goes_does_not_depend_on_what_others_touch(layout):
    """Ids are looked up among those of others; numbers and entries that it does not touch are left alone."""
    side = 128
    weight, run = torch.zeros(side, side), 1 if layout == "flat" else side
    ids = torch.arange(side * side // run)

    def slice_of(chosen):
        region = Region.of((side, side), layout, chosen)
        return [(Slice(region, torch.ones(region.values_shape)), 1.0)]

    def cost(others):
        ledger = Ledger()
        for i, chosen in enumerate(others):
            ledger, _ = ledger.entered(f"other {i}", slice_of(chosen), weight)
        with Counted() as coming:
            ledger, (region, original) = ledger.entered("mine", slice_of(ids[: len(ids) // 64]), weight)
            region.write_(weight, ledger.rounded(region, original))
        with Counted() as leaving:
            ledger, (region, original) = ledger.left("mine", weight)
            region.write_(weight, ledger.rounded(region, original))
        return coming.made, leaving.made

    few = cost([ids[: len(ids) // 32], ids[len(ids) // 32 :][: len(ids) // 32]])
    many = cost([ids[: len(ids) // 2], ids[len(ids) // 32 :]])
    assert many == few
    assert max(many) < 60 * side * side // 64


def test_numbers_of_a_part_are_those_of_the_whole():
    rng, shape = generator(0, "part"), (6, 8)
    original = torch.randn(shape, generator=rng)
    members = [
        (Slice(r, torch.randn(r.values_shape, generator=rng)), s) for r, s in zip(regions(shape), (1, 0.5, 1, 2, 1))
    ]
    whole = combined(Region.of(shape, "all"), original, members)
    for region in regions(shape):
        assert torch.equal(combined(region, region.read(original), members), region.read(whole))
