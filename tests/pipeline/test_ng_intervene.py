"""`ng.intervene`: every kind through the front door, means, other prompts, other models, folding, leaving no trace."""

import pytest
import torch

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.taps.board import ATTRIBUTE
from neurograft.core.taps.stream import means
from neurograft.worlds.pico import pico, pico_batch


def chosen(model, kind="neuron", count=3):
    where = sites(model, kind)
    return ng.Selection.of(where, {n: range(count) for n in where})


def clean(model):
    return ATTRIBUTE not in vars(model) and all(
        not m._forward_pre_hooks and not m._forward_hooks for m in model.modules()
    )


@pytest.mark.parametrize(("kind", "given"), [
    ("zero", {}), ("scale", {"factor": -2.0}), ("pin", {"value": 0.5}), ("add", {"value": 0.5}),
])  # fmt: skip
def test_a_block_changes_the_model_and_its_end_undoes_it(kind, given, tmp_path):
    model = pico("bert")
    batch, where = pico_batch(model), chosen(model)
    plain = model(**batch).logits
    with ng.intervene(model, where, kind, **given) as live:
        changed = model(**batch).logits
    assert clean(model)
    assert torch.equal(model(**batch).logits, plain)
    assert not torch.allclose(changed, plain, atol=1e-6)
    graft = live.fold()
    assert not graft.operations
    with ng.Graft.load(graft.save(tmp_path / "fold")).on(model):
        assert torch.allclose(model(**batch).logits, changed, atol=1e-5)
    with ng.Graft.load(live.graft().save(tmp_path / "operations")).on(model):
        assert torch.equal(model(**batch).logits, changed)
    assert torch.equal(model(**batch).logits, plain)
    assert graft.card["intervention"]["kind"] == kind


def test_a_scale_of_nothing_but_one_is_the_model():
    model = pico("llama")
    batch = pico_batch(model)
    plain = model(**batch).logits
    with ng.intervene(model, chosen(model), "scale", factor=1.0):
        assert torch.equal(model(**batch).logits, plain)
    with ng.intervene(model, chosen(model), "scale", factor=2.0) as outer:
        with ng.intervene(model, chosen(model), "scale", factor=0.5):
            assert torch.allclose(model(**batch).logits, plain, atol=1e-6)
        assert not torch.allclose(model(**batch).logits, plain, atol=1e-6)
    assert len(outer.operations) == 2
    assert clean(model)


def test_replacing_by_the_mean_over_data_and_over_another_models_data():
    model, other = pico("llama"), pico("llama", seed=1)
    batch, where, data = pico_batch(model), chosen(model), [pico_batch(model, seed=3)]
    for source in (None, other):
        hand = means(source or model, where.sites, data)
        with ng.intervene(model, where, "replace", data=data, source=source) as live:
            changed = model(**batch).logits
        for step in live.operations:
            assert torch.equal(step.value, hand[step.site.name][:3])
        with ng.intervene(model, where, "pin", value={n: v[:3] for n, v in hand.items()}):
            assert torch.equal(model(**batch).logits, changed)


def test_replacing_by_another_prompt():
    model = pico("llama")
    batch, other = pico_batch(model), pico_batch(model, seed=4)
    with ng.intervene(model, chosen(model), "replace", source=batch):
        assert torch.allclose(model(**batch).logits, model(**batch).logits)
        same = model(**batch).logits
    assert torch.allclose(same, model(**batch).logits, atol=1e-6)
    with ng.intervene(model, chosen(model), "replace", source=other):
        assert not torch.allclose(model(**batch).logits, same, atol=1e-6)


def test_following_another_model_live():
    model, other = pico("llama"), pico("llama", seed=1)
    with torch.no_grad():  # one network but for its FFNs
        for mine, theirs in zip(model.model.layers, other.model.layers):
            theirs.self_attn.load_state_dict(mine.self_attn.state_dict())
        other.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
        for a, b in zip(model.model.layers, other.model.layers):
            b.mlp.down_proj.load_state_dict(a.mlp.down_proj.state_dict())
        other.lm_head.load_state_dict(model.lm_head.state_dict())
    where = chosen(model, count=48)
    for seed in (0, 1):
        batch = pico_batch(model, seed=seed)
        with ng.intervene(model, where, "replace", source=other) as live:
            assert torch.allclose(model(**batch).logits, other(**batch).logits, atol=1e-6)
    assert clean(model)
    assert clean(other)
    with pytest.raises(ng.RequestError, match="follows another model"):
        live.graft()
    with ng.intervene(model, where, "replace", source=other):
        model(**batch)
        with pytest.raises(ng.RunError, match="called alone"):  # and not what the other model did before
            model.model(input_ids=batch["input_ids"])
    with ng.intervene(model, where, "replace", source=other), pytest.raises(ng.RunError, match="use_cache=False"):
        model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=2)
    assert clean(model)
    with pytest.raises(ng.RequestError, match="own source"):
        with ng.intervene(model, where, "replace", source=model):
            pass
    assert clean(model)


@pytest.mark.parametrize(("match", "kind", "given"), [
    ("did you mean 'scale'", "scal", {}), ("'scale' with nothing", "scale", {}),
    ("'zero' with value", "zero", {"value": 1}),
    ("'replace' with nothing", "replace", {}), ("expected factor", "scale", {"value": 1.0}),
    ("a source of type str", "replace", {"source": "x"}), ("one value of shape", "add", {"value": [1.0, 2.0, 3.0]}),
    ("no value for", "add", {"value": {}}),
])  # fmt: skip
def test_bad_requests(match, kind, given):
    model = pico("llama")
    with pytest.raises(ng.RequestError, match=match):
        ng.intervene(model, chosen(model), kind, **given)
    with pytest.raises(ng.RequestError, match="no unit"):
        ng.intervene(model, ng.Selection.of(sites(model, "neuron"), {}), "zero")
    assert clean(model)


def test_a_block_that_never_reaches_the_units_is_an_error():
    model = pico("llama")
    model.model.layers[1].mlp.forward = lambda x: x  # somebody's fused kernel
    with pytest.raises(ng.RunError, match="never fired in 1 forward passes"):
        with ng.intervene(model, chosen(model), "zero"):
            model(**pico_batch(model))
    del model.model.layers[1].mlp.forward
    with ng.intervene(model, chosen(model), "zero"):
        pass
    assert clean(model)
