"""Networks against slow twins in float64: the same numbers and the same gradients."""

import pytest
import torch
import torch.nn.functional as F

from neurograft.networks._coupling import Tape, in_two
from neurograft.networks.locally_shared_conv2d import LocallySharedConv2d
from neurograft.networks.reversible import Reversing, halves
from neurograft.worlds.pico import pico, pico_batch

EXACT = {"rtol": 0, "atol": 1e-12}


class Stored:
    """The block's own forward pass under plain autograd, which keeps everything."""

    def __init__(self, block):
        self.block = block

    def __call__(self, hidden, *args, **kwargs):
        given = self.block.arguments(args, kwargs)
        given |= {k: v for k, v in (("past_key_values", None), ("use_cache", False)) if k in given}
        return self.block.out(self.block.forward(*in_two(hidden), given))


@pytest.mark.parametrize(("family", "form"), [("llama", "standard"), ("llama", "coupled"), ("gpt2", "standard")])
def test_gradients_of_reversible_blocks_are_those_of_autograd(family, form):
    model = pico(family, dtype=torch.float64)
    batch = pico_batch(model, batch=3)
    blocks = Reversing(model, halves(model), Tape(form, verify=1, tolerance=1e-9))
    found = {}
    for kind in ("recovered", "stored"):
        for layer, wrapped in blocks.wrapped:
            layer.forward = wrapped if kind == "recovered" else Stored(wrapped.block)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found[kind] = [loss.detach()] + [p.grad for p in model.parameters()]
    assert blocks.tape.stored == 0
    for mine, twin in zip(found["recovered"], found["stored"]):
        torch.testing.assert_close(mine, twin, **EXACT)
    blocks.remove()


@pytest.mark.parametrize(("grid", "kernel", "padding"), [(2, 3, None), ((1, 2), 3, 0), ((2, 3), 1, None)])
def test_locally_shared_filters_cell_by_cell(grid, kernel, padding):
    torch.manual_seed(0)
    layer = LocallySharedConv2d(3, 4, kernel, grid=grid, padding=padding).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    (down, across), conv = layer.grid, layer.conv
    weights, biases = conv.weight.chunk(down * across), conv.bias.chunk(down * across)
    cells = [
        F.conv2d(cell, weights[i * across + j], biases[i * across + j], padding=conv.padding)
        for i, band in enumerate(x.chunk(down, 2))
        for j, cell in enumerate(band.chunk(across, 3))
    ]
    twin = torch.cat([torch.cat(cells[i * across : (i + 1) * across], 3) for i in range(down)], 2)
    made = layer(x)
    torch.testing.assert_close(made, twin, **EXACT)
    mine, theirs = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (made, twin))
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
