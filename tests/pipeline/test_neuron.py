"""Neuron pages: exemplars at the planted token, logits by hand, partners, what silence costs."""

import json

import pytest
import torch

import neurograft as ng
from neurograft.core.taps.board import ATTRIBUTE
from neurograft.pipeline.neuron import located, neuron
from neurograft.worlds.pico import pico, pico_batch

UNIT = "model.layers.1.mlp/neuron:9"


def planted():
    """Neuron 9 of the last layer reads token 5; neuron 10 is its twin; neuron 9 writes token 7."""
    model = pico("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        trigger = model.model.embed_tokens.weight[5]
        for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
            matrix[9] = matrix[10] = trigger
        mlp.down_proj.weight[:, 9] = 3 * model.lm_head.weight[7] / model.lm_head.weight[7].norm()
    batches = [pico_batch(model, batch=4, seed=s) for s in range(3)]
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 5] = 6
    batches[1]["input_ids"][2, 3] = 5
    batches[2]["input_ids"][0, 1] = 5
    return model, batches


def test_a_page_shows_what_was_planted():
    model, batches = planted()
    page = neuron(model, UNIT, batches, top=3, partners=2, controls=4)
    assert page["unit"] == {"site": "model.layers.1.mlp/neuron", "id": 9, "kind": "neuron", "at": "act", "layer": 1}
    peaks = [(e["tokens"][e["positions"].index(e["peak"])], e["peak"]) for e in page["exemplars"][:2]]
    assert sorted(peaks) == [("5", 1), ("5", 3)]
    assert page["writes"]["raised"][0]["id"] == 7
    assert page["writes"]["norm"] == pytest.approx(3.0)
    assert page["silenced_logits"]["raised"][0]["id"] == 7
    assert page["partners"][0]["id"] == 10
    assert page["partners"][0]["correlation"] == pytest.approx(1.0)
    assert page["activity"]["tokens"] == sum(int(b["attention_mask"].sum()) for b in batches)
    assert page["activity"]["quantiles"]["0.99"] > page["activity"]["quantiles"]["0.5"]
    assert page["silence"]["examples"] == 12
    json.dumps(page)
    assert ATTRIBUTE not in vars(model)


def test_activations_of_an_exemplar_are_those_of_the_model():
    model, batches = planted()
    page = neuron(model, UNIT, batches, top=1, controls=2)
    (best,) = page["exemplars"]
    held = {}
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: held.update(x=a[0]))
    for batch in batches:
        for row in range(4):
            model(input_ids=batch["input_ids"][row : row + 1], attention_mask=batch["attention_mask"][row : row + 1])
            real = held["x"][0, batch["attention_mask"][row].bool(), 9]
            if real.max().item() == pytest.approx(page["activity"]["largest"]):
                assert best["activations"] == pytest.approx(real.tolist(), abs=1e-6)
                break
    hook.remove()


def test_without_data_only_the_weights_speak():
    model, _ = planted()
    page = neuron(model, UNIT)
    assert set(page) == {"unit", "writes"}
    hand = model.lm_head.weight @ model.model.layers[1].mlp.down_proj.weight[:, 9]
    assert page["writes"]["raised"][0]["logit"] == pytest.approx(hand.max().item(), rel=1e-5)
    assert page["writes"]["lowered"][0]["logit"] == pytest.approx(hand.min().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "head"), ("gpt2", "neuron"), ("vit", "neuron"), ("t5", "neuron"), ("mixtral", "neuron")],
)
def test_other_families(family, kind):
    from neurograft.anatomy.sites import sites

    model = pico(family)
    name = next(iter(sites(model, kind)))
    page = neuron(model, f"{name}:1", [pico_batch(model)], controls=2, top=2)
    assert page["exemplars"]
    json.dumps(page)


@pytest.mark.parametrize(("unit", "match"), [
    ("model.layers.1.mlp/neuron", "SITE:ID"), ("model.layers.1.mlp/neurn:3", "did you mean 'neuron'"),
    ("model.layers.1.mlpp/neuron:3", "did you mean"), ("model.layers.1.mlp/neuron:48", "0 to 47"),
])  # fmt: skip
def test_bad_units(unit, match):
    with pytest.raises(ng.RequestError, match=match):
        located(pico("llama"), unit)
