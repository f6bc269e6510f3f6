"""Options of adapters that no recipe sets: LoRA's scale and dropout, what a plan by depth must leave alone."""

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError
from neurograft.core.selection import Selection
from neurograft.pipeline.attach import attach
from neurograft.worlds.pico import pico, pico_batch


@pytest.mark.parametrize(("options", "scale"), [({}, 2.0), ({"alpha": 12.0}, 3.0), ({"rslora": True}, 4.0)])
def test_the_scale_of_lora(options, scale):
    """alpha / r, 2 r / r unless alpha is given, 2 r / sqrt(r) if stabilised; r = 4."""
    model = pico("llama")
    batch = pico_batch(model)
    with attach(model, adapter=("lora", {"r": 4, **options})) as live:
        for p in live.parameters():
            p.data.fill_(0.1)
        seen, graft = model(**batch).logits, live.graft()
    assert {d.scale for d in graft.deltas.values()} == {scale}
    with graft.on(model):
        torch.testing.assert_close(model(**batch).logits, seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_dropout_of_lora(rate):
    model = pico("llama").train()
    batch = pico_batch(model)
    with attach(model, adapter=("lora", {"r": 4, "dropout": rate})) as live, torch.random.fork_rng(devices=[]):
        for p in live.parameters():
            p.data.fill_(0.1)
        torch.manual_seed(0)
        one, two = (model(**batch).logits for _ in range(2))
        assert torch.equal(one, two) is (rate == 0.0)


@pytest.mark.parametrize("adapter", ["mask", ("slice_lora", {"rank": 1}), ("slice", {"tie": "site"})])
def test_adapters_that_need_a_plain_base_say_which_parameter_carries_a_graft(adapter):
    model = pico("llama")
    found = sites(model, "row", match="*0*up_proj*")
    where = Selection.of(found, {name: [0, 1] for name in found})
    with attach(model, where) as live:
        live.parameters()[0].data.add_(1.0)
        graft = live.graft()
    with attach(model, where, adapter=adapter):
        pass
    with graft.on(model), pytest.raises(RequestError, match=r"layers\.0\.mlp\.up_proj\.weight, which carries a graft"):
        with attach(model, where, adapter=adapter):
            pass


def test_a_plan_by_depth_leaves_what_is_protected_alone():
    """Neither its low-rank updates nor what it draws anew reach protected units."""
    model = pico("llama")
    name = "model.layers.1.self_attn.q_proj"
    found = {n: s for n, s in sites(model, "module").items() if s.parts[0].param == f"{name}.weight"}
    guarded = Selection.of(found, {key: [0] for key in found})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with attach(model, adapter=("strata", {"plan": [{"train": ["low_rank"]}], "r": 2}), protect=guarded) as live:
        trained = list(live.named_parameters())
        assert any(n.startswith("model.layers.0.self_attn.q_proj") for n in trained)
        assert not any(n.startswith(name) for n in trained)
    plan = [{"upto": 1, "train": []}, {"train": ["redrawn"]}]
    with attach(model, adapter=("strata", {"plan": plan}), protect=guarded) as live:
        now = dict(model.named_parameters())
        assert torch.equal(now[f"{name}.weight"], before[f"{name}.weight"])
        other = "model.layers.1.self_attn.k_proj.weight"
        assert not torch.equal(now[other], before[other])
        assert f"{name}.weight" not in live.named_parameters()
