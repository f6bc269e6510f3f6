"""What every audit of the room promises; audits are found in their folder, never listed."""

import copy
import json
import math

import pytest
import torch
from test_paired import columns_graft

from neurograft.core.choose import choose, methods
from neurograft.core.grafts.graft import Graft
from neurograft.worlds.pico import pico, pico_batch

FAMILIES = ("llama", "bert", "vit")
FOUND = [choose("audits", name) for name in methods("audits")]
CLAIM = [a.name.rpartition(".")[2] for a in FOUND if a.card.claims >= {"empty_is_zero", "noise_floor"}]


def of(name):
    return choose("audits", name).function


@pytest.fixture(params=FAMILIES)
def setting(request):
    model = pico(request.param)
    return model, [pico_batch(model, batch=4, seed=i) for i in range(2)], columns_graft(pico(request.param))


def touching_nothing(model):
    """A graft that rewrites numbers with themselves."""
    return columns_graft(model, amount=0.0)


def test_there_are_audits_and_they_claim_it():
    assert len(CLAIM) >= 7


@pytest.mark.parametrize("name", CLAIM)
def test_a_change_of_nothing_scores_exactly_zero(name, setting):
    model, batches, _ = setting
    for change in (Graft(), touching_nothing(model), copy.deepcopy(model)):
        for key, measure in of(name)(model, change, batches)["measures"].items():
            assert measure["change"]["value"] == 0.0, key
            assert measure["change"]["low"] in (0.0, None)
            assert measure["change"]["high"] in (0.0, None)


@pytest.mark.parametrize("name", CLAIM)
def test_it_reports_a_noise_floor_and_plain_finite_data(name, setting):
    model, batches, graft = setting
    found = of(name)(model, graft, batches)
    json.dumps(found, allow_nan=False)
    moved = []
    for measure in found["measures"].values():
        assert math.isfinite(measure["noise_floor"]["value"])
        assert measure["noise_floor"]["value"] >= 0
        assert measure["better"] in ("higher", "lower", "zero")
        assert measure["unit"]
        moved.append(measure["change"]["value"] != 0.0)
    assert any(moved)  # an audit that sees nothing would pass the law of zero


@pytest.mark.parametrize("name", CLAIM)
def test_it_leaves_model_and_random_state_as_found_and_repeats(name, setting):
    model, batches, graft = setting
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    one, two = (of(name)(model, graft, batches) for _ in range(2))
    assert one == two
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())
