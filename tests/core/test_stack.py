"""The stack: the base is seen below it, whatever shapes overlap, and what cannot be written is refused."""

import itertools

import pytest
import torch
from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.combined import patched
from neurograft.core.grafts.coordinates import Same
from neurograft.core.grafts.delta import LowRank, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import ATTRIBUTE, Stack
from neurograft.core.region import Region, as_matrix
from neurograft.core.seeds import generator


def net():
    made, rng = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(8, 6)), generator(0, "net")
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    return made


def regions(shape):
    """One region of every layout, overlapping each other."""
    yield Region.of(shape, "rows", [0, 3])
    yield Region.of(shape, "cols", [1, 5])
    yield Region.of(shape, "block", [0, 5], block=(2, 2))
    yield Region.of(shape, "flat", [0, 1, 9, 24, 47])
    yield Region.of(shape, "all")


@pytest.mark.parametrize(("above", "below"), list(itertools.product(range(5), range(5))))
def test_the_base_is_seen_through_every_pair_of_layouts(above, below):
    shape, rng = (6, 8), generator(0, "pair")
    base, other = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    outer, under = list(regions(shape))[above], list(regions(shape))[below]
    now = base.clone()
    under.write_(now, under.read(other))
    assert torch.equal(patched(outer, outer.read(now), under, under.read(base)), outer.read(base))


def test_a_graft_made_on_a_stack_belongs_to_the_base_below():
    model, base = net(), net()
    first = Graft.made(model, {"1.weight": Slice(Region.of((6, 8), "rows", [1]), torch.ones(1, 8))})
    low = LowRank((6, 8), torch.ones(1, 8), torch.ones(6, 1), 0.5)
    with first.on(model), Graft.made(model, {"1.weight": low}).on(model):
        stack, where = Stack.of(model), Same(model)
        assert same_bits(stack.base("1.weight", model, where), base[1].weight)
        column = Region.of((6, 8), "cols", [2])
        assert same_bits(stack.numbers("1.weight", column, model, where), column.read(base[1].weight))
        assert Graft.made(model, {"1.weight": low}).base == {"1.weight": first.base["1.weight"]}
        assert stack.base("1.bias", model, where).data_ptr() == model[1].bias.data_ptr()  # no copy of what is untouched
        summed = stack.unrounded("1.weight", model[1].weight, column)
        assert torch.equal(summed, column.read(model[1].weight))
    assert same_bits(model[1].weight, base[1].weight)


def test_changes_that_read_a_weight_as_other_matrices_meet():
    """A convolution's weight read as one matrix by one graft and as a bank by another: entries count, not ids."""
    shape = (6, 4, 3)
    model, base = net(), net()
    as_one = Slice(Region.of(shape, "rows", [2], matrix=as_matrix(shape, bank=False)), torch.full((1, 12), 2.0))
    as_bank = Slice(Region.of(shape, "rows", [8]), torch.full((1, 3), 5.0))  # bank 2, row 0: inside of row 2 above
    grafts = [Graft.made(model, {"0.weight": change}) for change in (as_one, as_bank)]
    expected = base[0].weight.detach().clone()
    expected[2] = 2.0
    expected[2, 0] = base[0].weight[2, 0] + (2.0 - base[0].weight[2, 0]) + (5.0 - base[0].weight[2, 0])
    for first, second in (grafts, grafts[::-1]):
        with first.on(model), second.on(model):
            torch.testing.assert_close(model[0].weight.detach(), expected)
            both = model[0].weight.detach().clone()
        assert same_bits(model[0].weight, base[0].weight)
        with (first + second).on(model):
            assert torch.equal(model[0].weight, both)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m[1].__setattr__("weight", nn.Parameter(m[1].weight.detach().t().contiguous().t())),
        lambda m: m[1].to("meta"),
        lambda m: m[1].__setattr__("weight", nn.Parameter(m[1].weight.detach().to(torch.int8), requires_grad=False)),
    ],
)
def test_weights_that_cannot_be_written_are_refused(spoil):
    model = net()
    graft = Graft.made(model, {"1.weight": Slice(Region.of((6, 8), "rows", [1]), torch.ones(1, 8))})
    spoil(model)
    with pytest.raises(RequestError, match="contiguous floating-point weight in memory"):
        graft.apply(model)
    assert ATTRIBUTE not in model.__dict__
