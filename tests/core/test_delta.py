"""Changes, their sums, their files: numbers worked out by hand, and every way a file can be spoiled."""

import itertools
import json

import pytest
import torch
from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.codes import narrow_ids, wide_ids
from neurograft.core.grafts.combined import combined
from neurograft.core.grafts.delta import LowRank, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.packing import FORMAT
from neurograft.core.region import Region


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)


def slice_of(model, name, layout, ids, seed=0):
    rng = torch.Generator().manual_seed(seed)
    region = Region.of(model.get_parameter(name).shape, layout, ids)
    return Slice(region, torch.randn(region.values_shape, generator=rng))


def three(model):
    """Overlapping grafts: two rows and a bias entry, two columns, a scaled low-rank one."""
    rng = torch.Generator().manual_seed(3)
    low = LowRank((5, 6), torch.randn(2, 6, generator=rng), torch.randn(5, 2, generator=rng), 0.5)
    return [
        Graft.made(
            model,
            {"0.weight": slice_of(model, "0.weight", "rows", [0, 2]), "1.bias": slice_of(model, "1.bias", "flat", [1])},
        ),
        Graft.made(model, {"0.weight": slice_of(model, "0.weight", "cols", [1, 3], seed=1)}),
        Graft.made(model, {"0.weight": low}).scale(0.3),
    ]


def bits(model):
    return {k: v.detach().clone().view(torch.uint8) for k, v in model.state_dict().items()}


def same_bits(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_order_of_apply_and_remove_gives_the_same_bits(dtype):
    model = net(dtype)
    with torch.no_grad():  # numbers that a float comparison would confuse
        model[0].weight[0, :3] = torch.tensor([float("nan"), -0.0, 0.0], dtype=dtype)
    base, grafts = bits(model), three(model)
    reached = []
    for order in itertools.permutations(grafts):
        for graft in order:
            graft.apply(model)
        reached.append(bits(model))
        order[1].remove(model)
        alone = bits(model)
        order[1].apply(model)
        order[0].remove(model)
        order[2].remove(model)
        assert not same_bits(alone, reached[-1])
        order[1].remove(model)
        assert same_bits(bits(model), base)
    assert all(same_bits(r, reached[0]) for r in reached)


def test_sums_by_hand():
    region = Region.of((2, 2), "all")
    original = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    row = Slice(Region.of((2, 2), "rows", [0]), torch.tensor([[5.0, 6.0]]))
    column = Slice(Region.of((2, 2), "cols", [0]), torch.tensor([[0.0, 0.0]]))
    found = combined(region, original, [(row, 1.0), (column, 0.5)])
    # corner: 1 + (5 - 1) + 0.5 (0 - 1); right: the row's own value; below: 3 + 0.5 (0 - 3); untouched: 4
    assert found.tolist() == [[4.5, 6.0], [1.5, 4.0]]


def test_a_lone_unscaled_change_is_its_value_exactly():
    original, value = torch.tensor([1e8]), torch.tensor([1.25])
    region = Region.of((1,), "flat", [0])
    assert combined(region, original, [(Slice(region, value), 1.0)]).item() == 1.25
    assert (original + (value - original)).item() != 1.25  # what a sum would give


def test_a_sum_of_grafts_equals_both_on_the_stack():
    model = net()
    first, second, third = three(model)
    with first.on(model), second.on(model):
        both = bits(model)
    with (first + second).on(model):
        assert same_bits(bits(model), both)
    with pytest.raises(RequestError, match="bind"):
        _ = Graft(first.deltas, base=first.base) + Graft(second.deltas, base=second.base)
    bound = Graft(first.deltas, base=first.base).bind(model) + third.bind(model)
    with bound.on(model):
        summed = model[0].weight.detach().clone()
    with first.on(model), third.on(model):
        torch.testing.assert_close(model[0].weight.detach(), summed, rtol=1e-6, atol=1e-6)


def test_refusals_change_nothing():
    model = net()
    base, (graft, other, _) = bits(model), three(model)
    graft.apply(model)
    on = bits(model)
    with pytest.raises(RequestError, match="second apply"):
        graft.apply(model)
    with pytest.raises(RequestError, match="not on this model"):
        other.remove(model)
    assert same_bits(bits(model), on)
    graft.remove(model)
    with torch.no_grad():
        model[1].bias[3] += 1e-3
    changed = bits(model)
    with pytest.raises(RequestError, match="other numbers"):
        graft.apply(model)
    assert same_bits(bits(model), changed)
    assert not same_bits(changed, base)
    with pytest.raises(RequestError, match="shape"):
        Graft.made(
            nn.Sequential(nn.Linear(3, 5)), {"0.weight": Slice(Region.of((5, 3), "rows", [0]), torch.ones(1, 3))}
        ).apply(model)
    with pytest.raises(RequestError, match="tensor of this model"):
        Graft({"2.weight": graft.deltas["0.weight"]}, base={"2.weight": ""}).apply(model)
    with pytest.raises(RequestError, match="strength"):
        Graft({"0.weight": New(torch.ones(5, 6))}).scale(0.5)


def test_another_graft_is_checked_against_the_base_below_the_stack():
    model = net()
    first, second, _ = three(model)
    with first.on(model):
        assert second.base["0.weight"] == tensor_digest(net()[0].weight)
        second.apply(model)
        again = Graft.made(model, {"0.weight": second.deltas["0.weight"]})
        assert again.base == second.base
        second.remove(model)


def test_a_wider_copy_of_the_base_is_the_same_base():
    narrow = net(torch.bfloat16)
    graft = Graft.made(narrow, {"0.weight": slice_of(narrow, "0.weight", "rows", [1])})
    wide = net(torch.bfloat16).float()
    with graft.on(wide):
        assert torch.equal(wide[0].weight[1], graft.deltas["0.weight"].values[0])


def test_round_trip_of_every_kind(tmp_path):
    model = net()
    graft = Graft.made(
        model,
        {
            "0.weight": LowRank((5, 6), torch.randn(2, 6), torch.randn(5, 2), 0.25),
            "0.bias": slice_of(model, "0.bias", "flat", [0, 4]),
            "1.weight": slice_of(model, "1.weight", "cols", [2]),
            "1.bias": New(torch.randn(4)),
        },
        card={"recipe": "by hand"},
    ).scale(1.0)
    again = Graft.load(graft.save(tmp_path / "g"))
    assert again.identity == graft.identity
    assert again.card["recipe"] == "by hand"
    base = bits(model)
    with graft.on(model):
        here = bits(model)
    with again.on(model):
        assert same_bits(bits(model), here)
    assert same_bits(bits(model), base)
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == ["graft.json", "graft.safetensors"]


def spoil_truncate(folder):
    path = folder / "graft.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def spoil_bits(folder):
    path = folder / "graft.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def spoil_text(folder):
    path = folder / "graft.json"
    path.write_text(path.read_text().replace('"strength": 1.0', '"strength": 2.0'))


def spoil_json(folder):
    (folder / "graft.json").write_text("{")


def spoil_missing(folder):
    (folder / "graft.safetensors").unlink()


@pytest.mark.parametrize("spoil", [spoil_truncate, spoil_bits, spoil_text, spoil_json, spoil_missing])
def test_spoiled_files_are_refused(tmp_path, spoil):
    folder = three(net())[0].save(tmp_path / "g")
    spoil(folder)
    with pytest.raises(RequestError, match="truncated or changed"):
        Graft.load(folder)


def test_newer_formats_and_wrong_places_are_refused(tmp_path):
    folder = three(net())[0].save(tmp_path / "g")
    text = json.loads((folder / "graft.json").read_text())
    text["format"] = FORMAT + 1
    (folder / "graft.json").write_text(json.dumps(text))
    with pytest.raises(RequestError, match="upgrade"):
        Graft.load(folder)
    with pytest.raises(RequestError, match="does not exist"):
        Graft.load(tmp_path / "nothing")
    with pytest.raises(RequestError, match="a graft"):
        Graft.load(tmp_path)


def test_ids_are_narrow_and_exact():
    ids = torch.tensor([0, 5, 300, 70_000, 1 << 33])
    for gaps in (True, False):
        assert torch.equal(wide_ids(narrow_ids(ids, gaps=gaps), gaps=gaps), ids)
    assert narrow_ids(torch.tensor([3, 200]), gaps=False).dtype == torch.uint8
    assert narrow_ids(torch.tensor([100_000, 100_001]), gaps=True).dtype == torch.uint32


def test_the_digest_tells_neighbours_apart():
    x = torch.randn(40)
    y = x.clone()
    y[7] = torch.nextafter(y[7], torch.tensor(9.0))
    assert tensor_digest(x) != tensor_digest(y)
    assert tensor_digest(x) != tensor_digest(x.view(4, 10))
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))


def test_new_tokens_come_and_go():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=True))
    base, old = bits(model), model[0].weight
    rows = torch.randn(2, 3)
    graft = Graft.made(model, {"0.weight": New(rows, 4), "1.bias": New(torch.ones(2), 4), "1.weight": New(rows, 4)})
    with graft.on(model):
        assert torch.equal(model[0](torch.tensor([4, 5])), rows)
        assert model(torch.tensor([5])).shape == (1, 6)
    assert model[0].weight is old
    assert (model[0].num_embeddings, model[1].out_features) == (4, 4)
    assert same_bits(bits(model), base)
