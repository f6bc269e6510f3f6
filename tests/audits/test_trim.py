"""`ng.trim`: the harmful part goes, the useful one stays, and nothing happens where nothing is wrong."""

import pytest
import torch
from _tables import TASK, A, B, target, text
from torch import nn

import neurograft as ng
from neurograft.audits._changes import as_change
from neurograft.core.errors import RequestError
from neurograft.core.grafts import below
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.pipeline.trim import _only, _places, _subset
from neurograft.worlds.pico import pico


class SumForCausalLM(nn.Module):
    """A language model whose logits are the sum of three tables, its layers."""

    def __init__(self):
        super().__init__()
        logits = target().clamp(min=-9)
        logits[list(TASK)] *= 0.3
        self.layers = nn.ModuleList([nn.Embedding(12, 12) for _ in range(3)])
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(logits / 3)

    def forward(self, input_ids, attention_mask=None):
        return sum(layer(input_ids) for layer in self.layers)


def graft(model, **more):
    """Layer 0 helps the task, layer 1 harms domain b, layer 2 harms a little and helps more."""
    moves = {0: (TASK, 0.4 * target().clamp(min=-9)), 1: (B, -0.5 * target().clamp(min=-9))}
    moves[2] = (TASK, 0.1 * target().clamp(min=-9))
    deltas = {}
    for layer, (rows, move) in moves.items():
        name = f"layers.{layer}.weight"
        weight = model.get_parameter(name).detach()
        region = Region.of(weight.shape, "rows", list(rows))
        deltas[name] = Slice(region, (weight + move)[list(rows)])
    return Graft.made(model, deltas, card={"recipe": "by hand"})


@pytest.fixture(scope="module")
def data():
    return {"gain": text(TASK, 24, 1), "keep": {"a": text(A, 24, 2), "b": text(B, 24, 3)}}


def test_the_harmful_part_is_left_out(data):
    model = SumForCausalLM()
    before = model.layers[1].weight.detach().clone()
    found = ng.trim(model, graft(model), **data)
    assert set(found.deltas) == {"layers.0.weight", "layers.2.weight"}
    card = found.card["trim"]
    assert (card["left_out"], card["reached"], found.card["recipe"]) == (["layers.1"], True, "by hand")
    assert card["before"]["losses"]["b"] > 0.05 > card["after"]["losses"]["b"] == 0.0
    assert card["after"]["gain"] == pytest.approx(card["before"]["gain"])
    assert ng.audit(model, found, probes="none", **data).verdict == "ship"
    assert torch.equal(before, model.layers[1].weight)


def test_a_graft_within_its_tolerances_stays_whole(data, tmp_path):
    model = SumForCausalLM()
    graft(model).save(tmp_path / "g")
    found = ng.trim(model, tmp_path / "g", rules={"tolerance": 99.0}, by="tensor", **data)
    assert found.identity == graft(model).identity
    assert found.card["trim"]["left_out"] == []


def test_what_cannot_be_reached_is_said(data):
    model = SumForCausalLM()
    found = ng.trim(model, graft(model), rules={"tolerances": {"a": -1.0}}, **data)
    assert not found.card["trim"]["reached"]
    assert len(found.deltas) >= 1


def test_bad_requests(data):
    model = SumForCausalLM()
    with pytest.raises(RequestError, match="both"):
        ng.trim(model, graft(model), gain=data["gain"])
    with pytest.raises(RequestError, match="tensor"):
        ng.trim(model, graft(model), by="neuron", **data)
    lone = Graft.made(model, {"layers.0.weight": graft(model).deltas["layers.0.weight"]})
    with pytest.raises(RequestError, match="at least two parts"):
        ng.trim(model, lone, **data)


def test_the_base_is_hashed_once_however_many_parts_are_left_out(data, monkeypatch):
    model, hashed = SumForCausalLM(), []
    made, plain = graft(model), below.tensor_digest
    monkeypatch.setattr(below, "tensor_digest", lambda t: hashed.append(t.data_ptr()) or plain(t))
    ng.trim(model, made, rules={"tolerances": {"a": -1.0}}, **data)
    assert len(hashed) == len(made.deltas) == len(set(hashed))


@pytest.mark.parametrize("shape", ["slice", "lora", "slice and an operation"])
def test_some_tensors_alone_are_what_a_graft_of_them_alone_would_be(shape):
    model = pico("mixtral", dtype=torch.bfloat16)
    where = ng.locate(model, by="noise").top(fraction=0.3)
    with ng.attach(model, adapter="lora") if shape == "lora" else ng.attach(model, where) as live:
        for i, p in enumerate(live.parameters()):
            p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        whole = live.graft()
    if shape == "slice and an operation":
        whole = whole + ng.intervene(model, where, "scale", factor=0.5).graft()
    keep = list(whole.deltas)[::2]
    change, before = as_change(model, whole), {n: p.clone() for n, p in model.named_parameters()}
    with _only(change, _places(model, whole), keep):
        here = {n: p.clone() for n, p in model.named_parameters()}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert any(not torch.equal(here[n], before[n]) for n in before)
    with _subset(whole, keep).on(model):
        assert all(torch.equal(p, here[n]) for n, p in model.named_parameters())
