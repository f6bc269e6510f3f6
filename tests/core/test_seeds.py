"""Named numbers from the global generators, and their states put back."""

from contextlib import suppress

import pytest
import torch

from neurograft.core.seeds import derive, seeded
from neurograft.pipeline.attach import attach
from neurograft.worlds.pico import pico


def test_what_is_drawn_is_named_and_the_state_comes_back_after_an_error():
    before = torch.get_rng_state()
    with suppress(ValueError), seeded(3, "layer", 1):
        drawn = torch.rand(4)
        raise ValueError
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(derive(3, "layer", 1))))


def test_generators_of_gpus_that_are_not_in_use_are_not_seeded(monkeypatch):
    """torch.manual_seed would: a GPU that is first used later would go on from our seed and not from the user's."""
    sown = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", sown.append)
    model = pico("llama")
    with attach(model, adapter="lora"):
        assert not sown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_gpus_in_use_come_back():
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    model = pico("llama").cuda()
    with attach(model, adapter="lora"):
        assert torch.equal(before, torch.cuda.get_rng_state())
