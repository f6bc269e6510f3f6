"""New heads: shipped as they were trained, whatever the base's dtype and whenever the graft is taken."""

import pytest
import torch
from _compact import bits, same_bits

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.grafts.delta import New
from neurograft.core.selection import Selection
from neurograft.worlds.pico import pico, pico_batch


def trained(model, adapter, *, lr, steps=3):
    """Train a new head beside a first layer; returns the mount inside, the graft made inside, and the last logits."""
    batch, layers = pico_batch(model), sites(model, "neuron" if adapter == "slice" else "layer")
    name = next(iter(layers))
    with ng.attach(model, Selection.of(layers, {name: [0]}), adapter=adapter, new=["classifier"]) as live:
        optimizer = torch.optim.AdamW(live.parameters(), lr=lr)
        for _ in range(steps):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return live, live.graft(), model(**batch).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("adapter", ["slice", "dense"])
def test_a_graft_taken_after_the_block_has_the_trained_head(adapter, dtype):
    model = pico("bert", dtype=dtype)
    before = bits(model)
    live, inside, logits = trained(model, adapter, lr=1e-2)
    assert same_bits(bits(model), before)
    after = live.graft()
    assert after.identity == inside.identity
    assert {n for n, d in after.deltas.items() if isinstance(d, New)} == {"classifier.weight", "classifier.bias"}
    with after.on(model), torch.no_grad():
        assert torch.equal(model(**pico_batch(model)).logits, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_new_head_of_a_narrow_base_is_trained_in_float32(dtype):
    """Steps far below the head's own resolution add up; in its own dtype most of them would round to nothing."""
    model = pico("bert", dtype=dtype)
    start = model.classifier.weight.detach().float()
    live, graft, _ = trained(model, "slice", lr=1e-6, steps=20)
    assert {p.dtype for p in live.parameters()} == {torch.float32}
    moved = graft.deltas["classifier.weight"].values - start
    assert bool((moved != 0).all())
    assert 5e-6 < float(moved.abs().max()) < 5e-5
