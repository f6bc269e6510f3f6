"""A low-rank update's budget of single weights, and PEFT's SHiRA as a recipe over it."""

import pytest
import torch
from tests.proofs._tools import rows_in

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.units import Part, Site
from neurograft.selectors.lora_budget import lora_budget
from neurograft.worlds.pico import pico, pico_batch


def scores(high, wide, *banks):
    units = [(high, wide), (wide, 1)]
    n = high * wide
    for count in banks:
        units, n = [(count, high * wide), *units], n * count
    return ng.Scores({"w": Site("w", "weight", n, (Part("w", tuple(units)),))}, {"w": torch.arange(n).float()})


def test_counts_by_hand():
    assert lora_budget(scores(4, 5), r=1).ids["w"].tolist() == list(range(11, 20))
    assert lora_budget(scores(4, 5), r=2, lowest=True).ids["w"].tolist() == list(range(18))
    assert len(lora_budget(scores(4, 5), r=3)) == 20  # 27 would be more than there are
    assert len(lora_budget(scores(4, 5, 3), r=1)) == 27  # a LoRA for each expert


def test_ties_go_to_the_lower_number():
    tied = scores(4, 5)
    tied = ng.Scores(tied.sites, {"w": torch.ones(20)})
    assert lora_budget(tied, r=1).ids["w"].tolist() == list(range(9))


def test_what_it_refuses():
    model = pico("llama")
    neurons = ng.locate(model, by="magnitude", units="neuron")
    with pytest.raises(ng.RequestError, match="single weights of matrices"):
        lora_budget(neurons)
    with pytest.raises(ng.RequestError, match="at least 1"):
        lora_budget(scores(4, 5), r=0)


def test_shira_touches_as_many_weights_of_each_layer_as_pefts():
    from peft import ShiraConfig, get_peft_model

    model, other = pico("llama"), pico("llama")
    batch = pico_batch(model, batch=8)
    rows = rows_in(batch)
    out = ng.run("shira", model, rows, changes={"r": 2, "roles": "attention", "batch": 8})
    config = ShiraConfig(r=2, mask_type="random", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    theirs = {
        name.removeprefix("base_model.model."): parameter.numel()
        for name, parameter in get_peft_model(other, config).named_parameters()
        if "shira_weight" in name
    }
    ours = {name: delta.region.numel for name, delta in out.graft.deltas.items()}
    assert ours == {n.partition(".shira_weight")[0] + ".weight": count for n, count in theirs.items()}
    assert len(ours) == 8
    with out.graft.on(model):
        assert (
            sum(int((p != q).sum()) for p, q in zip(model.parameters(), pico("llama").parameters())) == out.where.numel
        )
    again = ng.run("shira", model, rows, changes={"r": 2, "roles": "attention", "batch": 8}, seed=1).where
    assert len(again) == len(out.where)
    assert again.digest != out.where.digest
    assert set(sites(model, "weight")) > set(out.where.ids)
