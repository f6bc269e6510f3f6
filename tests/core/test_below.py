"""The base below grafts is read again for every graft that comes: by a checksum once its digest is known."""

import pytest
import torch
from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts import below, checksum
from neurograft.core.grafts.coordinates import coordinates
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import Stack
from neurograft.core.region import Region, as_matrix
from neurograft.core.seeds import generator
from neurograft.worlds.pico import pico

LAYOUTS = ("rows", "cols", "block", "flat", "all", "conv")


def region_of(shape, layout, ids):
    matrix = as_matrix(shape, bank=False) if layout == "conv" else None
    block = (2, 2) if layout == "block" else None
    layout = {"conv": "rows"}.get(layout, layout)
    return Region.of(shape, layout, [] if layout == "all" else ids, matrix=matrix, block=block)


def ones(model, name, region):
    return Graft.made(model, {name: Slice(region, torch.full(region.values_shape, 1.0 + len(region.ids)))})


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 6)], ids=["matrix", "bank"])
@pytest.mark.parametrize("piece", [1, 13, 1 << 18])
def test_a_checksum_is_that_of_the_base_whatever_lies_on_it(shape, piece, monkeypatch):
    monkeypatch.setattr(checksum, "PIECE", piece)
    rng, matrix = generator(0, "checksum"), as_matrix(shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        base, now = torch.randn(shape, generator=rng).to(dtype), torch.randn(shape, generator=rng).to(dtype)
        high = matrix[0] * matrix[1]
        for rows in (range(high), range(4, 8 if len(shape) == 3 else 6), range(1, 3)):
            wanted = checksum.checksum(base, rows, matrix, [])
            for layout in LAYOUTS[: 6 if len(shape) == 3 else 5]:
                if layout == "block" and len(shape) == 3:
                    continue
                weight = base.clone()
                regions = [region_of(shape, layout, [1, 2]), region_of(shape, "flat", range(40, 48))]
                held = [(region, region.read(base)) for region in regions]
                for region in regions:
                    region.write_(weight, region.read(now))
                assert checksum.checksum(weight, rows, matrix, held) == wanted, (layout, rows, dtype)
                weight.view(high, -1)[rows.start, 0] += 1
                changed = checksum.checksum(weight, rows, matrix, held[1:]) != wanted
                assert changed, (layout, rows, dtype)


@pytest.fixture
def digested(monkeypatch):
    """The shapes of the tensors that were digested."""
    shapes = []
    monkeypatch.setattr(
        below, "tensor_digest", lambda tensor: shapes.append(tuple(tensor.shape)) or tensor_digest(tensor)
    )
    return shapes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_between_two_applies_is_noticed_and_an_untouched_base_is_digested_once(layout, digested):
    shape, name = (4, 6, 3) if layout == "conv" else (6, 8), "0.weight"
    model = nn.Sequential(nn.Conv1d(6, 4, 3) if layout == "conv" else nn.Linear(8, 6))
    first = ones(model, name, region_of(shape, layout, [1, 2]))
    second, third = (ones(model, name, region_of(shape, "flat", ids)) for ids in ([0], [70 % (shape[0] * shape[1])]))
    digested.clear()
    with first.on(model):
        second.apply(model)
        second.remove(model)
        second.apply(model)
        assert digested == [shape]
        if layout != "all":
            kept = model[0].weight.data.view(-1)[-1].clone()
            model[0].weight.data.view(-1)[-1] += 1.0  # neither first nor second is there
            with pytest.raises(RequestError, match="other numbers"):
                third.apply(model)
            second.remove(model)  # nor may what leaves make it the base
            with pytest.raises(RequestError, match="other numbers"):
                third.apply(model)
            model[0].weight.data.view(-1)[-1] = kept
            second.apply(model)
        third.apply(model)
        third.remove(model)
        second.remove(model)


def test_experts_of_a_bank_are_checked_one_by_one(digested):
    model = pico("mixtral", num_hidden_layers=1, num_local_experts=3)
    where = coordinates(model)
    names = [n for n in where.names() if ".experts." in n and n.endswith("w2.weight")]
    grafts = [ones(model, n, Region.of(where.shape(n), "rows", ids)) for ids in ([0], [1]) for n in names]
    digested.clear()
    for graft in grafts:
        graft.apply(model)
    assert len(digested) == len(names) == 3
    (bank,) = where.modules(names[1])
    model.get_parameter(bank).data[1, -1] += 1.0
    for graft in grafts[:3]:
        graft.remove(model)
    grafts[0].apply(model)
    grafts[2].apply(model)
    assert len(digested) == 3
    with pytest.raises(RequestError, match="other numbers"):
        grafts[1].apply(model)
    assert set(Stack.of(model).known) == {names[0], names[2]}
