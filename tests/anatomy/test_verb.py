"""The verb `anatomy`, and conversions from one kind of unit to another."""

import json

import pytest
import torch

from neurograft.anatomy.convert import convert
from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError
from neurograft.core.selection import Selection
from neurograft.pipeline import anatomy as verb
from neurograft.worlds.pico import pico


def test_the_table_of_a_model_counts_sites_units_and_numbers():
    found = verb.anatomy(pico("mixtral"), verify=True)
    assert json.loads(json.dumps(found)) == found
    assert (found["family"], found["layers"], found["head"]) == ("mixtral", 2, "lm_head")
    rows = {(row["kind"], row["at"]): row for row in found["kinds"]}
    neuron = rows["neuron", "act"]
    assert (neuron["sites"], neuron["units"], neuron["numbers"]) == (8, 8 * 48, 8 * 48 * 3 * 32)
    assert neuron["example"] == "model.layers.0.mlp.experts.0/neuron"
    assert neuron["verified"] == "2 equal"
    assert rows["expert", "router"]["tap"] == "reading only"
    assert rows["weight", ""]["tap"] == "none"
    assert found["parameters"] == rows["module", ""]["numbers"]


def test_all_says_what_passes_and_why_the_others_do_not(monkeypatch):
    monkeypatch.setattr(verb, "families", lambda: ["llama"])
    monkeypatch.setattr(verb, "strangers", lambda: ["gptj", "codegen"])
    found = verb.anatomy(all=True, limit=1)
    assert (found["family file: pass"], found["dataflow: pass"]) == ("1 of 1", "1 of 2")
    reasons = {row["architecture"]: row["reason"] for row in found["architectures"]}
    assert reasons["llama"] == reasons["gptj"] == ""
    assert "neither stacked nor grouped" in reasons["codegen"]


@pytest.mark.parametrize("given", [{}, {"model": pico("llama"), "all": True}])
def test_neither_a_model_nor_all_is_refused(given):
    with pytest.raises(RequestError, match="a model, or all=True"):
        verb.anatomy(**given)


def test_a_neuron_is_its_rows_and_its_column_and_a_row_alone_is_no_neuron():
    model = pico("qwen2")
    name = "model.layers.1.mlp/neuron"
    chosen = Selection.of(sites(model, "neuron"), {name: [2, 5]})
    gates = convert(chosen, sites(model, "neuron", at="gate"))
    assert {n: ids.tolist() for n, ids in gates.ids.items() if len(ids)} == {f"{name}@gate": [2, 5]}
    rows = convert(gates, sites(model, "row"))
    found = {n: ids.tolist() for n, ids in rows.ids.items() if len(ids)}
    assert found == {f"model.layers.1.mlp.{p}_proj/row": [2, 5] for p in ("gate", "up")}
    with pytest.raises(RequestError, match="no whole unit of kind neuron@act"):
        convert(rows, sites(model, "neuron"))
    columns = convert(chosen, sites(model, "column"))
    both = Selection.of({**rows.sites, **columns.sites}, {**rows.ids, **columns.ids})
    assert torch.equal(convert(both, sites(model, "neuron")).ids[name], torch.tensor([2, 5]))


def test_a_query_head_is_no_key_value_head_that_others_share():
    model = pico("llama")
    chosen = Selection.of(sites(model, "head"), {"model.layers.0.self_attn/head": [0, 1]})
    with pytest.raises(RequestError, match="no whole unit of kind head@kv"):
        convert(chosen, sites(model, "head", at="kv"))
    own = pico("llama", num_key_value_heads=4)
    chosen = Selection.of(sites(own, "head"), {"model.layers.0.self_attn/head": [1]})
    found = convert(chosen, sites(own, "head", at="kv"))
    assert found.ids["model.layers.0.self_attn/head@kv"].tolist() == [1]
