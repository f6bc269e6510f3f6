"""Neuron pages in the report: the units a change touches most, by hand, and their cards."""

import copy
import json
from xml.etree import ElementTree

import pytest
import torch

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.audits._changes import as_change
from neurograft.core.errors import RunError
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.core.selection import Selection
from neurograft.pipeline.neuron import neuron
from neurograft.pipeline.touched import touched
from neurograft.report.neurons import card
from neurograft.report.report import Report
from neurograft.worlds.pico import pico, pico_batch

LAYER = "model.layers.1.mlp"


def changed(model):
    """Move neuron 7 by 3 in one number of its column and 4 in one of its gate's row, neuron 2 by 1."""
    down, gate = model.get_parameter(f"{LAYER}.down_proj.weight"), model.get_parameter(f"{LAYER}.gate_proj.weight")
    columns, rows = Region.of(down.shape, "cols", [2, 7]), Region.of(gate.shape, "rows", [7])
    values, more = columns.read(down).clone(), rows.read(gate).clone()
    values[0, 5], values[1, 0], more[0, 9] = values[0, 5] + 1, values[1, 0] + 3, more[0, 9] + 4
    deltas = {f"{LAYER}.down_proj.weight": Slice(columns, values), f"{LAYER}.gate_proj.weight": Slice(rows, more)}
    return Graft.made(model, deltas)


def test_units_are_ordered_by_the_norm_of_the_change_of_all_their_numbers():
    model = pico("llama")
    found = touched(model, as_change(model, changed(model)), count=5)
    assert [unit for unit, _ in found] == [f"{LAYER}/neuron:7", f"{LAYER}/neuron:2"]
    assert [norm for _, norm in found] == pytest.approx([5.0, 1.0], abs=1e-5)


def test_units_that_an_operation_changes_come_first():
    model = pico("llama")
    where = Selection.of(sites(model, "neuron"), {f"{LAYER}/neuron": [30]})
    change = as_change(model, [changed(model), ng.intervene(model, where, "zero").graft()])
    assert [unit for unit, _ in touched(model, change, count=2)] == [f"{LAYER}/neuron:30", f"{LAYER}/neuron:7"]


@pytest.fixture(scope="module")
def report():
    model = pico("llama")
    gain, keep = [pico_batch(model, batch=9, seed=1)], {"plain": [pico_batch(model, batch=9, seed=3)]}
    rules = {"draws": 300, "nulls": 3}
    return ng.audit(model, changed(model), gain=gain, keep=keep, probes="none", neurons=2, rules=rules)


def test_the_report_holds_the_pages_and_shows_them(report, tmp_path):
    pages = report.data["neurons"]
    assert [p["unit"]["id"] for p in pages] == [7, 2]
    assert pages[0]["changed_by"] == pytest.approx(5.0, abs=1e-5)
    assert len(pages[0]["exemplars"]) == 3
    html = report.html()
    assert html.count('<article class="unit">') == 2
    assert f"{LAYER}/neuron:7" in html
    assert Report.load(report.save(tmp_path).parent).html() == html
    assert "<article" not in Report({k: v for k, v in report.data.items() if k != "neurons"}).html()


def test_a_card_says_what_was_found(report):
    page = report.data["neurons"][0]
    root = ElementTree.fromstring(card(page).replace("&nbsp;", " "))
    names = [e.text for e in root.iter("dt")]
    assert names[0] == "change of its numbers"
    assert {"active", "moves with", "when silenced", "its weights raise", "its activity lowers"} <= set(names)
    assert root.find("p").text == page["description"][0]["text"]
    best = page["exemplars"][0]
    marked = [m for m in root.iter("mark") if m.get("class") == "m4"]
    assert best["tokens"][best["positions"].index(best["peak"])] in {m.text for m in marked}


def test_hostile_tokens_are_shown_as_they_are():
    one = {"peak": 0, "positions": [0, 1], "tokens": ["<b>", "x\n"], "activations": [2.0, 0.9]}
    made = card({"unit": {"site": "a/neuron", "id": 1}, "description": [{"text": "<i>"}], "exemplars": [one]})
    assert "<b>" not in made
    assert '<mark class="m4" title="2">&lt;b&gt;</mark> <mark class="m2" title="0.9">x↵</mark>' in made
    assert '<p class="said">&lt;i&gt;</p>' in made


@pytest.mark.parametrize(("family", "kind"), [("vit", "neuron"), ("t5", "neuron")])
def test_pages_of_other_models_are_described_by_what_their_units_see(family, kind):
    model = pico(family)
    batch = pico_batch(model, batch=6)
    site = next(n for n in sites(model, kind) if family != "t5" or n.startswith("decoder"))
    page = neuron(model, f"{site}:3", [batch], top=2, controls=2)
    json.dumps(page)
    assert card(page).startswith('<article class="unit">')
    said = page["description"]
    assert said == sorted(said, key=lambda d: -d["score"])
    if family == "t5":
        seen = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        assert set(said[0]["text"].split(" | ")) <= {str(t) for t in seen.unique().tolist()}


def test_a_planted_neurons_description_is_its_token():
    model = pico("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(0))
        for matrix in (model.model.layers[1].mlp.gate_proj.weight, model.model.layers[1].mlp.up_proj.weight):
            matrix[9] = model.model.embed_tokens.weight[60]
    batches = [pico_batch(model, batch=8, length=12, seed=s) for s in range(3)]
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 60] = 6
        batch["input_ids"][::2, 4] = 60
    assert neuron(model, f"{LAYER}/neuron:9", batches, controls=2)["description"][0]["text"] == "60"


def test_three_brief_pages_come_unasked_and_none_where_none_is_wanted():
    model = pico("llama")
    how = {"gain": [pico_batch(model, batch=9, seed=1)], "probes": "none", "rules": {"draws": 50, "nulls": 0}}
    found = ng.audit(model, changed(model), **how)
    assert [p["unit"]["id"] for p in found.data["neurons"]] == [7, 2]
    assert {len(p["exemplars"]) for p in found.data["neurons"]} == {2}
    assert all(p["silence"] is None for p in found.data["neurons"])
    assert "on a few examples" in found.html()
    assert "when silenced" not in found.html()
    assert "neurons" not in ng.audit(model, changed(model), neurons=0, **how).data


def test_a_model_whose_units_cannot_be_read_is_audited_all_the_same():
    model = pico("mamba")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.backbone.layers[0].mixer.conv1d.weight.mul_(1.5)
    how = {"gain": [pico_batch(model, batch=3)], "probes": "none", "rules": {"draws": 50, "nulls": 0}}
    found = ng.audit(model, tuned, **how)
    assert found.data["neurons"] == []
    assert "never fired" in found.data["no_neurons"]
    assert "There is no page of a neuron: the tap of" in found.html()
    with pytest.raises(RunError, match="never fired"):
        ng.audit(model, tuned, neurons=1, **how)


def test_the_numbers_of_a_bank_are_laid_out_once_for_all_its_experts(monkeypatch):
    model = pico("mixtral")
    tuned = copy.deepcopy(model)
    bank = tuned.model.layers[0].mlp.experts.down_proj
    with torch.no_grad():
        bank[2, :, 5] += 3.0
    wholes, real = [], Region.write_
    monkeypatch.setattr(Region, "write_", lambda self, *args: (wholes.append(self.shape), real(self, *args))[1])
    found = touched(model, as_change(model, tuned), count=2)
    assert [unit.rpartition(":")[2] for unit, _ in found] == ["5"]
    assert found[0][1] == pytest.approx(3.0 * bank.shape[1] ** 0.5, rel=1e-4)
    assert wholes == [tuple(bank.shape)]
