"""Grafts as values: dtypes of the base, sums of low-rank changes, names that changed."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

import neurograft as ng
from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import same_bits, tensor_digest
from neurograft.core.grafts import contents
from neurograft.core.grafts.delta import LowRank, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region, as_matrix
from neurograft.core.seeds import generator
from neurograft.core.units import Parameters
from neurograft.worlds.pico import pico


def net(dtype=torch.float32):
    made = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    rng = generator(0, "net")
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    return made.to(dtype)


def rows(seed=0):
    return Slice(Region.of((5, 6), "rows", [1, 3]), torch.randn(2, 6, generator=generator(seed, "rows")))


def low(seed, transposed=False):
    rng = generator(seed, "low")
    A, B = (torch.randn(2, 5, generator=rng), torch.randn(6, 2, generator=rng))
    if not transposed:
        A, B = torch.randn(2, 6, generator=rng), torch.randn(5, 2, generator=rng)
    return LowRank((5, 6), A, B, 0.25, transposed)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_graft_of_a_narrow_base_fits_its_wider_copy_with_unrounded_values(narrow):
    base, wide = net(narrow), net(narrow).float()
    graft = Graft.made(base, {"0.weight": rows()})
    with graft.on(wide):
        assert torch.equal(wide[0].weight[1], graft.deltas["0.weight"].values[0])
    with graft.on(base):
        assert torch.equal(base[0].weight[1], graft.deltas["0.weight"].values[0].to(narrow))
    assert same_bits(wide[0].weight, net(narrow).float()[0].weight)


def test_a_graft_of_a_wide_base_is_refused_on_its_rounded_copy():
    graft = Graft.made(net(), {"0.weight": rows()})
    base = net().bfloat16()
    with pytest.raises(RequestError, match="loaded as float32 or wider"):
        graft.apply(base)
    assert same_bits(base[0].weight, net().bfloat16()[0].weight)


def test_a_float64_base_is_itself_alone():
    graft = Graft.made(net(torch.float64), {"0.weight": low(1)})
    base = net(torch.float64)
    with graft.on(base):
        product = 0.25 * (low(1).B @ low(1).A)
        assert torch.equal(base[0].weight, net(torch.float64)[0].weight + product.double())
    with pytest.raises(RequestError, match="other numbers"):
        graft.apply(net())


def test_digests_of_halves():
    """Equal for every exact widening, different for one bit anywhere, in the upper or lower half."""
    x = torch.randn(7, 3, generator=generator(0, "x"))
    for narrow in (torch.bfloat16, torch.float16):
        assert tensor_digest(x.to(narrow)) == tensor_digest(x.to(narrow).float())
    for bit in range(32):
        y = x.clone()
        y.view(torch.int32)[2, 1] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert tensor_digest(x) != tensor_digest(y), bit
    assert tensor_digest(torch.zeros(3)) == tensor_digest(torch.zeros(3, dtype=torch.bfloat16))
    assert tensor_digest(torch.zeros(3)) != tensor_digest(torch.zeros(3, dtype=torch.float64))
    assert tensor_digest(torch.tensor(2.0)) != tensor_digest(torch.tensor(3.0))
    assert tensor_digest(torch.tensor([True])) != tensor_digest(torch.tensor([False]))


@pytest.mark.parametrize(("left", "right"), [(False, False), (True, False), (False, True)])
def test_the_sum_of_low_rank_changes_is_low_rank(left, right):
    base = net()
    first, second = (
        Graft.made(base, {"0.weight": low(1, left)}),
        Graft.made(base, {"0.weight": low(2, right)}).scale(-0.5),
    )
    total = first + second
    assert isinstance(total.deltas["0.weight"], LowRank)
    assert total.deltas["0.weight"].A.shape[0] == 4
    with total.on(base):
        summed = base[0].weight.detach().clone()
    with first.on(base), second.on(base):
        torch.testing.assert_close(summed, base[0].weight.detach(), rtol=1e-6, atol=1e-6)


def test_a_low_rank_graft_keeps_factors_while_it_is_on():
    base, delta = net(), low(1)
    Graft.made(base, {"0.weight": delta}).apply(base)
    (ledger,) = base.__dict__["_neurograft_stack"].ledgers.values()
    ((change, _),) = ledger.ordered()
    assert change.low.A is delta.A
    assert change.low.B is delta.B


def test_a_tensor_under_another_name_is_found_by_its_module(tmp_path):
    graft = Graft.made(net(), {"0.weight": rows()})
    renamed = replace(
        graft,
        deltas={"old.name": graft.deltas["0.weight"]},
        base={"old.name": graft.base["0.weight"]},
        card={**graft.card, "modules": {"old.name": ["0.weight"]}},
    )
    base = net()
    with renamed.on(base):
        assert torch.equal(base[0].weight[1], graft.deltas["0.weight"].values[0])
    assert renamed.bind(base).originals.keys() == {"old.name"}
    folder = renamed.export(tmp_path / "patch", to="patch", model=base)
    with safe_open(folder / "patch.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"0.weight::values", "0.weight::indices"}, "the name this model has"
    with pytest.raises(RequestError, match="tensor of this model"):
        replace(renamed, card={}).apply(base)


def test_new_parameters_have_no_strength_and_one_owner():
    base = net()
    head = Graft.made(base, {"1.weight": New(torch.ones(4, 5))})
    other = Graft.made(base, {"1.weight": New(torch.zeros(4, 5))})
    assert head.base == {}
    with pytest.raises(RequestError, match="relative to the base"):
        head.scale(2.0)
    with pytest.raises(RequestError, match="both bring"):
        _ = head + other
    with head.on(base), pytest.raises(RequestError, match="brings too"):
        other.apply(base)


def test_a_sum_has_the_same_bits_in_either_order_and_as_a_stack():
    """Float32 sums depend on their order; both take it from the grafts' digests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Linear(64, 64, bias=False)
        region = Region.of((64, 64), "rows", range(64))
        a, b = (Graft.made(base, {"weight": Slice(region, torch.randn(64, 64))}) for _ in range(2))
    with b.on(a.apply(base)):
        stacked = base.weight.detach().clone()
    a.remove(base)
    for both in (a + b, b + a):
        assert torch.equal(both.deltas["weight"].values, stacked)


def test_a_change_stored_the_other_way_round_is_another_one():
    """Of a square weight B @ A and its transpose have the same shape, factors and base."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    rng = generator(0, "square")
    factors = torch.randn(2, 4, generator=rng), torch.randn(4, 2, generator=rng)
    made = [Graft.made(model, {"0.weight": LowRank((4, 4), *factors, 1.0, way)}) for way in (False, True)]
    assert not torch.equal(*(g.deltas["0.weight"].product() for g in made))
    assert made[0].identity != made[1].identity


def test_a_graft_of_a_bank_does_not_look_the_parameters_up_for_every_expert(monkeypatch):
    # A bank's checkpoint has three tensors an expert: walking the model for each is quadratic in the experts.
    def walks(experts):
        model, count = pico("mixtral", num_local_experts=experts), []
        where = ng.locate(model, by="noise", units="neuron").top(fraction=0.5, per="site")
        with ng.attach(model, where) as live:
            of = Parameters.of
            monkeypatch.setattr(Parameters, "of", lambda net: count.append(net) or of(net))
            graft = live.graft()
            made, known = len(count), len(graft.deltas)
            graft = replace(graft, originals={})
        assert graft.bind(model).originals.keys() == graft.deltas.keys()
        monkeypatch.undo()
        return known, made, len(count) - made

    few, many = walks(2), walks(8)
    assert many[0] > 3 * few[0]
    assert many[1:] == few[1:]


def test_a_graft_at_another_strength_is_not_hashed_again(monkeypatch):
    graft = Graft({"w": rows()}, base={"w": "b"})
    known, hashed = graft.identity, []
    plain = contents.digest
    monkeypatch.setattr(contents, "digest", lambda *given: hashed.append(given) or plain(*given))
    half = graft.scale(0.5)
    assert half.identity == known == half.scale(3.0).identity
    assert not hashed
    assert replace(half, deltas={"w": rows(1)}).identity != known


def test_a_sum_of_grafts_of_a_float64_base_keeps_its_numbers():
    base, rng = net(torch.float64), generator(0, "wide")
    a, b = (
        Graft.made(
            base, {"0.weight": Slice(Region.of((5, 6), "rows", [i]), torch.randn(1, 6, generator=rng).double() + 1e-12)}
        )
        for i in (0, 3)
    )
    with a.on(base), b.on(base):
        both = base[0].weight.detach().clone()
    with (a + b).on(base):
        assert torch.equal(base[0].weight, both)


def test_grafts_are_told_apart_by_being_another():
    base = net()
    a, b = (Graft.made(base, {"0.weight": rows(seed)}) for seed in (0, 1))
    assert [g in [a] for g in (a, b)] == [True, False]
    assert len({a, b, a}) == 2


def test_a_bank_read_as_one_matrix_has_other_columns():
    """Their numbers and the shape of their values are the same: the fourth column of one, the first of expert 1."""
    model, shape = nn.Sequential(nn.Conv1d(3, 3, 3, bias=False)), (3, 3, 3)
    regions = [Region.of(shape, "cols", [3], matrix=as_matrix(shape, bank=bank)) for bank in (True, False)]
    a, b = (Graft.made(model, {"0.weight": Slice(r, torch.ones(1, 3))}) for r in regions)
    assert a.identity != b.identity
    with a.on(model), b.on(model):
        assert (model[0].weight == 1).sum() == 4  # of three each, one is of both


@pytest.mark.parametrize(("layout", "shape"), [("rows", (0, 6)), ("cols", (0, 5)), ("flat", (0,))])
def test_a_change_of_no_entries_changes_nothing(layout, shape, tmp_path):
    base = net()
    none = Graft.made(base, {"0.weight": Slice(Region.of((5, 6), layout), torch.zeros(shape))})
    some = Graft.made(base, {"0.weight": rows()})
    with some.on(base):
        wanted = base[0].weight.detach().clone()
    none = Graft.load(none.save(tmp_path / "g"))
    with none.on(base):
        assert same_bits(base[0].weight, net()[0].weight)
        with some.on(base):
            assert same_bits(base[0].weight, wanted)
    assert same_bits(base[0].weight, net()[0].weight)
