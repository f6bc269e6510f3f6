"""Masks by hand, the packed form of shut entries, and the adapter's two ends."""

import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.core_model_loading import Chunk, WeightConverter

from neurograft.anatomy.sites import sites
from neurograft.core.compact.mask import Mask
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.codes import packed_bits, shortest, unpacked_bits
from neurograft.core.grafts.combined import merged
from neurograft.core.grafts.delta import Shut, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site
from neurograft.edits.shut import shut
from neurograft.pipeline.attach import attach
from neurograft.worlds.pico import pico

S = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
PULL = torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_every_shape_by_hand():
    assert Mask("straight", 0.25).soft(S).tolist() == [0, 0, 1]
    assert Mask("straight", 0.25).pulled(S, PULL).tolist() == [1, 2, -4]
    assert Mask("clamp").soft(S).tolist() == [0, 0.25, 1]
    assert Mask("clamp").hard(S).tolist() == [False, False, True]
    patch = torch.tensor([True, False, False])
    m = [sigmoid(s - 10) for s in S.tolist()]
    flip = Mask("flip", 10.0)
    assert flip.soft(S, patch).tolist() == pytest.approx([1 - m[0], m[1], m[2]])
    slope = [x * (1 - x) for x in m]
    assert flip.pulled(S, PULL, patch).tolist() == pytest.approx([-slope[0], 2 * slope[1], -4 * slope[2]])
    assert flip.hard(S, patch).tolist() == [True, False, False]


def test_a_flip_starts_at_its_patch_within_a_ten_thousandth():
    patch, flip = torch.arange(1000) % 3 == 0, Mask("flip", 10.0)
    s = flip.start(torch.zeros(1000), torch.Generator().manual_seed(0))
    off = (flip.soft(s, patch) - patch.float()).abs()
    assert float(off.min()) > 4.5e-5
    assert float(off.max()) < 1.3e-4


def test_a_flip_starts_at_the_same_numbers_for_the_same_seed():
    like, flip = torch.zeros(50, dtype=torch.bfloat16), Mask("flip", 10.0)
    one, two, other = (flip.start(like, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    exact = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(one, exact.bfloat16())


def test_a_clamp_is_held_after_each_step():
    model = net()
    tuned = moved(model, [0, 64])
    with attach(model, rows(), adapter="mask", toward=tuned, shape="clamp") as live:
        (s,) = live.parameters()
        pull = torch.zeros_like(s)
        pull[0, 0], pull[1, 0], pull[2, 0] = 4.0, -4.0, 0.25
        s.grad = pull
        torch.optim.SGD([s], lr=1.0).step()
        assert s[:3, 0].tolist() == [0.0, 1.0, 0.75]
        assert live.graft().deltas["weight"].region.ids.tolist() == [64]


def test_unknown_shapes_are_refused():
    with pytest.raises(RequestError, match="shape of a mask"):
        Mask("gumbel")


@pytest.mark.parametrize("n", [1, 8, 13, 1000])
def test_bits_are_packed_and_read_again(n):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.4
    bits = packed_bits(mask)
    assert len(bits) == math.ceil(n / 8)
    assert torch.equal(unpacked_bits(bits)[:n], mask)
    assert not unpacked_bits(bits)[n:].any()
    literal = [sum(int(mask[8 * i + j]) << j for j in range(8) if 8 * i + j < n) for i in range(len(bits))]
    assert bits.tolist() == literal


def net():
    made = nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
    return made


@pytest.mark.parametrize(("share", "form", "size"), [(0.5, "bits", 256), (1 / 1024, "flat", 8)])
def test_a_file_holds_a_bit_a_weight_or_fewer(share, form, size, tmp_path):
    model = net()
    before = model.weight.detach().clone()
    ids = torch.randperm(2048, generator=torch.Generator().manual_seed(1))[: int(2048 * share)]
    graft = Graft.made(model, {"weight": Shut(Region.of((32, 64), "flat", ids))})
    assert shortest(graft.deltas["weight"].region)[0] == form
    graft.save(tmp_path)
    header = 8 + int.from_bytes((tmp_path / "graft.safetensors").read_bytes()[:8], "little")
    assert os.path.getsize(tmp_path / "graft.safetensors") - header <= size
    again = Graft.load(tmp_path)
    assert isinstance(again.deltas["weight"], Shut)
    assert again.identity == graft.identity
    with again.on(model):
        expected = before.clone().view(-1)
        expected[ids] = 0
        assert torch.equal(model.weight.view(-1), expected)
        with again.scale(0.5).on(net()) as half:
            assert torch.equal(half.weight.view(-1)[ids], before.view(-1)[ids] / 2)
    assert torch.equal(model.weight, before)


def test_shut_entries_stay_shut_when_joined():
    one, two = (Shut(Region.of((2, 3), "flat", ids)) for ids in ([0, 2], [5]))
    both = merged([(one, 1.0), (two, 1.0)], None)
    assert isinstance(both, Shut)
    assert both.region.ids.tolist() == [0, 2, 5]
    assert Shut(Region.of((2, 3), "cols", [1])).region.ids.tolist() == [1, 4]
    mixed = merged([(one, 1.0), (Slice(Region.of((2, 3), "flat", [5]), torch.ones(1)), 1.0)], None)
    assert mixed.values.tolist() == [0, 0, 1]


def test_what_several_masks_shut_is_shut_once():
    """Not original + 2 * (0 - original); beside a change of another kind the sum of both counts."""
    model = net()
    base = model.weight.detach().clone().view(-1)
    one, two = (Graft.made(model, {"weight": Shut(Region.of((32, 64), "flat", ids))}) for ids in ([0, 2], [2, 5]))
    both = base.clone()
    both[[0, 2, 5]] = 0
    with one.on(model), two.on(model):
        assert torch.equal(model.weight.view(-1), both)
    with two.on(model), one.on(model):
        assert torch.equal(model.weight.view(-1), both)
    joined = one + two
    assert isinstance(joined.deltas["weight"], Shut)
    with joined.on(model):
        assert torch.equal(model.weight.view(-1), both)
    row = Graft.made(model, {"weight": Slice(Region.of((32, 64), "rows", [0]), base.view(32, 64)[:1] + 1)})
    with one.on(model), two.on(model), row.on(model):
        both[:64] += 1
        torch.testing.assert_close(model.weight.view(-1), both)
    with one.on(model), two.scale(0.5).on(model):
        assert model.weight.view(-1)[2].item() == pytest.approx(-0.5 * base[2].item())
    assert torch.equal(model.weight.view(-1), base)


def rows(ids=(0, 1, 2, 3)):
    site = Site("w", "row", 32, (Part.rows("weight", (32, 64)),))
    return Selection.of({"w": site}, {"w": ids})


def moved(model, entries):
    tuned = net()
    tuned.weight.data.view(-1)[entries] += torch.arange(1.0, len(entries) + 1)
    return tuned


def test_the_gradient_of_a_mask_is_that_of_its_closed_form():
    """dL/ds = (1 - 2 patch) * dL/dw * (tuned - base) * sigma'(s - 10)."""
    model, x = net().double(), torch.randn(5, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tuned = moved(model, [0, 3, 70, 200]).double()
    with attach(
        model, rows(), adapter="mask", toward=tuned, shape="flip", patch=1 / 128
    ) as live:  # 2 of the 256 numbers
        (s,) = live.parameters()
        model(x).pow(2).sum().backward()
        now = model.weight.detach().clone().requires_grad_(True)
        nn.functional.linear(x, now).pow(2).sum().backward()
        sigma = torch.sigmoid(s.detach() - 10)
        patch = torch.zeros(4, 64, dtype=torch.bool).view(-1)
        patch[[70, 200]] = True
        gap = tuned.weight.detach()[:4] - live.lives[0].original
        closed = (1 - 2.0 * patch.view(4, 64)) * now.grad[:4] * gap * sigma * (1 - sigma)
        torch.testing.assert_close(s.grad, closed, rtol=1e-10, atol=1e-16)
        assert {n: d.region.ids.tolist() for n, d in live.graft().deltas.items()} == {"weight": [70, 200]}


def test_all_or_nothing_of_a_tuned_change_is_exact():
    model = net()
    tuned = moved(model, [0, 3, 70, 2000])
    for toward in (tuned, Graft.made(model, {"weight": _whole(tuned)})):
        with attach(model, rows(range(32)), adapter="mask", toward=toward, shape="clamp") as live:
            assert torch.equal(model.weight, tuned.weight)
            whole = live.graft()
            (s,) = live.parameters()
            s.data.zero_()
            live.write()
            assert torch.equal(model.weight, net().weight)
            assert live.graft().empty
        with whole.on(model):
            assert torch.equal(model.weight, tuned.weight)
        assert torch.equal(model.weight, net().weight)


def _whole(tuned):
    return Slice(Region.of((32, 64), "rows", range(32)), tuned.weight.detach().clone())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patch": 0.1}, "patch=0.1"),
        ({"toward": 3}, "toward=int"),
        ({"shape": "hard"}, "shape of a mask"),
        ({"toward": nn.Linear(64, 31, bias=False)}, "of shape"),
        ({"toward": net()}, "differs nowhere"),
        ({"tied": "untie"}, "tied weights"),
    ],
)
def test_bad_requests_are_named(options, said):
    with pytest.raises(RequestError, match=said):
        attach(net(), rows(), adapter="mask", **options)


def test_no_selection_and_grafts_below_are_refused():
    model = net()
    with pytest.raises(RequestError, match="without a selection"):
        attach(model, None, adapter="mask")
    with Graft.made(model, {"weight": Shut(Region.of((32, 64), "flat", [5]))}).on(model):
        with pytest.raises(RequestError, match="plain base"):
            attach(model, rows(), adapter="mask")


def test_foreign_numbers_under_a_mask_are_refused():
    model = net()
    x = torch.ones(1, 64)
    with attach(model, rows(), adapter="mask"):
        model.load_state_dict(model.state_dict())
        model(x)
        with pytest.raises(RunError, match="detach first"):
            model.load_state_dict({"weight": torch.ones(32, 64)})


@pytest.mark.parametrize("to", ["merged", "patch", "supertuning"])
def test_shut_entries_are_exported_as_zeros(to, tmp_path):
    model = pico("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    shut = Shut(Region.of(model.get_parameter(name).shape, "flat", [0, 33, 70]))
    values = Slice(shut.region, torch.zeros(3))
    for folder, delta in (("shut", shut), ("values", values)):
        Graft.made(model, {name: delta}).export(tmp_path / folder, to=to, model=model)
    files = sorted(p.name for p in (tmp_path / "values").iterdir() if p.suffix == ".safetensors")
    assert files
    for file in files:
        one, other = (load_file(tmp_path / folder / file) for folder in ("shut", "values"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_what_is_shut_in_several_parameters_of_one_checkpoint_tensor_is_one_delta():
    model = pico("llama", num_key_value_heads=4)
    names = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    model._weight_conversions = [WeightConverter("self_attn.qkv_proj.weight", names, operations=[Chunk(dim=0)])]
    where = sites(model, "row", match="*layers.0.self_attn.*")
    chosen = {n: ids for n, ids in zip(where, ([1, 2], [], [0], [])) if ids}
    graft = shut(Context(model, where), Selection.of(where, chosen))
    assert {n: d.region.numel for n, d in graft.deltas.items()} == {"model.layers.0.self_attn.qkv_proj.weight": 3 * 32}
    with graft.on(model):
        zero = [(model.get_parameter(f"model.layers.0.{n}") == 0).all(1).nonzero()[:, 0].tolist() for n in names]
    assert zero == [[1, 2], [], [0]]
