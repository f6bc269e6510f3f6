"""Promise 4: zero grafts change nothing, and every tensor declared awake moves."""

import pytest
import torch
from _compact import adapters, attached, bits, loss_of, same_bits, some_of

from neurograft.adapters.slice import slice as compact
from neurograft.worlds.pico import families, pico, pico_batch


def output(model, batch):
    with torch.no_grad():
        return model(**batch)[1 if "labels" in batch else 0]


@pytest.mark.parametrize("family", families())
def test_attaching_changes_no_bit_of_the_output(family):
    model = pico(family)
    batch, before = pico_batch(model), bits(model)
    wanted = output(model, batch)
    with compact(model, some_of(model), tied="both", allow_dense=True):
        assert torch.equal(output(model, batch), wanted)
        with torch.enable_grad():
            assert torch.equal(model(**batch)[1 if "labels" in batch else 0].detach(), wanted)
    assert same_bits(bits(model), before)
    assert torch.equal(output(model, batch), wanted)


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


@pytest.mark.parametrize("family", families())
def test_every_awake_tensor_moves(family):
    model = pico(family)
    batch = pico_batch(model, batch=4, length=16)
    with compact(model, some_of(model, fraction=0.5), tied="both", allow_dense=True) as live:
        before, loss = live.state_dict(), loss_of(batch)
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-3, weight_decay=0.0)  # decay would move anything
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        still = [n for n, p in live.named_parameters().items() if torch.equal(p, before[n])]
        assert [n for n in still if not _out_of_reach(n)] == []


def _out_of_reach(name):
    """Parameters that a batch with labels never asks: masks of pretraining, poolers beside the head."""
    return any(word in name for word in ("mask_token", "masked_spec_embed", "pooler", "token_type"))


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
        assert torch.equal(output(model, batch), wanted)
    assert same_bits(bits(model), before)
    assert not torch.equal(output(model, batch), wanted)
