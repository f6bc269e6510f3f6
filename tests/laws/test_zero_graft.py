"""Promise 4: zero grafts change nothing, and every tensor declared awake moves."""

import pytest
import torch
from _compact import adapters, attached, bits, dense_gradients, loss_of, regions, same_bits, some_of

from neurograft.adapters.slice import slice as compact
from neurograft.worlds.pico import families, pico, pico_batch


def output(model, batch, *, grad=False):
    with torch.set_grad_enabled(grad):
        return model(**batch)[1 if "labels" in batch else 0].detach()


@pytest.mark.parametrize("route", ["in-place", "side"])
@pytest.mark.parametrize("family", families())
def test_attaching_changes_no_bit_of_the_output(family, route):
    model = pico(family)
    batch, before = pico_batch(model), bits(model)
    wanted = {grad: output(model, batch, grad=grad) for grad in (False, True)}
    fused = any(
        isinstance(m, torch.nn.MultiheadAttention) for m in model.modules()
    )  # its fast path asks for plain weights
    with compact(model, some_of(model), tied="both", allow_dense=True, route=route):
        assert torch.equal(output(model, batch, grad=True), wanted[True])
        if fused:
            torch.testing.assert_close(output(model, batch), wanted[False], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(output(model, batch), wanted[False])
    assert same_bits(bits(model), before)
    assert torch.equal(output(model, batch), wanted[False])


@pytest.mark.parametrize("name", adapters("zero_graft"))
def test_an_untrained_graft_changes_nothing(name):
    model = pico("llama")
    batch, before = pico_batch(model), bits(model)
    wanted = output(model, batch)
    with attached(name, model) as live:
        assert torch.equal(output(model, batch), wanted)
        graft = live.graft()
    assert same_bits(bits(model), before)
    with graft.on(model):
        assert torch.equal(output(model, batch), wanted)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("route", ["in-place", "side"])
@pytest.mark.parametrize("family", families())
def test_every_awake_tensor_that_the_batch_reaches_moves(family, route):
    model = pico(family)
    loss = loss_of(pico_batch(model, batch=4, length=16))
    where = some_of(model, fraction=0.5)
    dense = dense_gradients(model, loss)
    reached = {n for n, r in regions(model, where).items() if r.read(dense[n]).abs().max() > 1e-7}
    assert len(reached) > 0.6 * len(dense)
    with compact(model, where, tied="both", allow_dense=True, route=route) as live:
        before = live.state_dict()
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-3, weight_decay=0.0)  # decay would move anything
        for _ in range(2):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        still = {n for n, p in live.named_parameters().items() if torch.equal(p, before[n])}
        assert not still & reached


@pytest.mark.parametrize("name", adapters("undo"))
def test_the_graft_gives_the_last_live_logits_and_comes_off(name):
    model = pico("llama")
    batch, before = pico_batch(model), bits(model)
    with attached(name, model) as live:
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        wanted = output(model, batch)
        inside = live.graft()
    assert same_bits(bits(model), before)
    after = live.graft()
    assert inside.identity == after.identity
    with after.on(model):
        if name in adapters("live_model"):  # the weights themselves held the values
            assert torch.equal(output(model, batch), wanted)
        else:
            torch.testing.assert_close(output(model, batch), wanted, rtol=1e-5, atol=1e-6)
    assert same_bits(bits(model), before)
    assert not torch.equal(output(model, batch), wanted)
