"""Merged, Supertuning and patch exports, each read back with the stock library or by hand."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.errors import RequestError, RunError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.coordinates import coordinates
from neurograft.core.grafts.delta import LowRank, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.intervene import Intervention
from neurograft.core.region import Region, as_matrix
from neurograft.core.seeds import generator
from neurograft.core.untie import Untie
from neurograft.pipeline.models import load_model
from neurograft.worlds.pico import pico, pico_batch


def everywhere(model, seed=0):
    """A graft with every kind of change: rows, columns, entries, dense, low rank, new."""
    rng, names = generator(seed, "everywhere"), coordinates(model).names()
    deltas, layouts = {}, ["rows", "cols", "flat", "all", "low"]
    for i, (name, shape) in enumerate(names.items()):
        layout = layouts[i % 5] if len(shape) == 2 else "flat"
        if layout == "low":
            deltas[name] = LowRank(
                shape, torch.randn(2, shape[1], generator=rng), torch.randn(shape[0], 2, generator=rng), 0.05
            )
            continue
        total = {"rows": as_matrix(shape)[1], "cols": as_matrix(shape)[2]}.get(layout, Region.of(shape, "flat").total)
        ids = () if layout == "all" else torch.randperm(total, generator=rng)[:3]
        region = Region.of(shape, layout, ids)
        deltas[name] = Slice(region, 0.1 * torch.randn(region.values_shape, generator=rng))
    last = list(names)[-1]
    deltas[last] = New(torch.randn(names[last], generator=rng))
    return Graft.made(model, deltas)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_bit_equal(family, dtype, tmp_path):
    pico(family).save_pretrained(tmp_path / "base")
    model = type(pico(family)).from_pretrained(tmp_path / "base", dtype=dtype).eval()
    graft, base = everywhere(model), state(model)
    folder = graft.export(tmp_path / "merged", to="merged", model=model, shard="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(folder).eval()
    with graft.on(model):
        on = state(model)
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in pico_batch(model).items()}
        wanted = model(**batch)[1]
        again = graft.export(tmp_path / "again", to="merged", model=model)
    assert all(same_bits(v, on[k]) for k, v in loaded.state_dict().items())
    assert all(same_bits(v, base[k]) for k, v in model.state_dict().items())
    assert all(same_bits(v, on[k]) for k, v in type(model).from_pretrained(again).state_dict().items())
    assert same_bits(loaded(**batch)[1], wanted)


def test_merged_takes_the_small_files_along_and_reads_back_what_it_wrote(tmp_path, monkeypatch):
    pico("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "old.bin").write_bytes(b"x")
    graft = everywhere(type(pico("llama")).from_pretrained(tmp_path / "base"))
    folder = graft.export(tmp_path / "out", to="merged")  # the base is found by the name on the card
    names = {p.name for p in folder.iterdir()}
    assert {"tokenizer.json", "config.json", "model.safetensors", "README.md"} <= names
    assert "old.bin" not in names
    import neurograft.export.merged as module

    monkeypatch.setattr(module, "same_bits", lambda a, b: False)
    with pytest.raises(RunError, match="nothing was kept"):
        graft.export(tmp_path / "bad", to="merged")
    assert not (tmp_path / "bad").exists()


def test_merged_shows_untied_weights(tmp_path):
    model = pico("llama", tie_word_embeddings=True)
    untied = Untie.of(model, ["lm_head.weight"]).mount(model)
    head = Slice(Region.of((64, 32), "rows", [5]), torch.ones(1, 32))
    graft = Graft.made(model, {"lm_head.weight": head})
    untied.remove()
    folder = graft.export(tmp_path / "m", to="merged", model=model)
    loaded = type(model).from_pretrained(folder)
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(loaded.lm_head.weight[5], torch.ones(32))
    assert not torch.equal(loaded.model.embed_tokens.weight[5], torch.ones(32))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merged_has_the_strength_asked_for_whatever_strength_is_on(tmp_path):
    model, name = pico("llama"), "model.layers.0.mlp.up_proj.weight"
    graft = Graft.made(model, {name: Slice(Region.of((48, 32), "rows", [1]), torch.ones(1, 32))})
    half = graft.scale(0.5)
    with half.on(model):
        wanted = model.get_parameter(name).detach().clone()
    with graft.on(model):
        folder = half.export(tmp_path / "half", to="merged", model=model)
        assert bool((model.get_parameter(name)[1] == 1).all()), "the model keeps the strength it had"
    assert torch.equal(type(model).from_pretrained(folder).get_parameter(name), wanted)


def test_the_base_a_graft_names_is_not_read_from_a_pickle(tmp_path):
    pico("llama").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    graft = everywhere(model)
    assert (graft.export(tmp_path / "a", to="patch") / "patch.safetensors").is_file()
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(RequestError, match="pickled weights are never read"):
        graft.export(tmp_path / "b", to="patch")
    assert not (tmp_path / "b").exists()


def test_merged_refuses_other_grafts_and_folders_in_use(tmp_path):
    model = pico("llama")
    graft, other = everywhere(model), everywhere(model, seed=1)
    with other.on(model), pytest.raises(RequestError, match="other grafts"):
        graft.export(tmp_path / "a", to="merged", model=model)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    with pytest.raises(RequestError, match="holds something"):
        graft.export(tmp_path / "b", to="merged", model=model)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["mine"]
    with pytest.raises(RequestError, match="without the base"):
        graft.export(tmp_path / "c", to="merged")
    with pytest.raises(RequestError, match="export format 'lroa'"):
        graft.export(tmp_path / "c", to="lroa", model=model)
    with pytest.raises(RequestError, match="did you mean 'shard'"):
        graft.export(tmp_path / "c", to="merged", model=model, shards="1GB")
    with pytest.raises(RequestError, match="5GB"):
        graft.export(tmp_path / "c", to="merged", model=model, shard="large")
    assert not (tmp_path / "c").exists()
    with pytest.raises(RequestError, match="a model of type str"):
        graft.apply("model")
    net = nn.Linear(2, 2)
    plain = Graft.made(net, {"bias": Slice(Region.of((2,), "flat", [0]), torch.ones(1))})
    with pytest.raises(RequestError, match="save_pretrained"):
        plain.export(tmp_path / "d", to="merged", model=net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supertuning_loads_in_stock_peft_and_transformers(dtype, tmp_path):
    model = pico("llama", dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base", dtype=dtype).eval()
    rng, deltas = generator(0, "scattered"), {}
    for i, (name, shape) in enumerate(coordinates(model).names().items()):
        if "mlp" in name:
            region = Region.of(shape, "flat", torch.randperm(shape[0] * shape[1], generator=rng)[: 5 + 7 * i])
            deltas[name] = Slice(region, 0.1 * torch.randn(region.values_shape, generator=rng))
    graft, batch = Graft.made(model, deltas), pico_batch(model)
    folder = graft.export(tmp_path / "s", to="supertuning", model=model)
    with torch.no_grad():
        before = model(**batch).logits
        with graft.on(model):
            wanted, on = model(**batch).logits, state(model)
        assert (wanted - before).abs().max() > 1e-3
        wrapped = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base", dtype=dtype), folder).eval()
        auto, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
        assert not info["unexpected_keys"]
        bound = 1e-6 if dtype == torch.float32 else 1e-2
        for loaded in (wrapped, auto.eval()):
            assert (loaded(**batch).logits - wanted).abs().max() <= bound
        merged = wrapped.merge_and_unload().state_dict()
    count = sum(int((merged[k] != v).sum()) for k, v in on.items())
    assert f"{count} of " in (folder / "README.md").read_text()
    with pytest.raises(RequestError, match=r"embed_tokens.*no weight of a linear"):
        everywhere(model).export(tmp_path / "t", to="supertuning", model=model)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_patch_by_hand_gives_the_grafted_checkpoint_and_its_undo_the_base(family, tmp_path):
    model = pico(family, dtype=torch.bfloat16)
    graft, where = everywhere(model).scale(1.0), coordinates(model)
    folder = graft.export(tmp_path / "p", to="patch", model=model)
    base = {n: where.read(n).clone() for n in where.names()}
    with graft.on(model):
        on = {n: where.read(n).clone() for n in where.names()}
    tensors = {n: t.clone() for n, t in base.items()}
    for file_name, wanted in (("patch.safetensors", on), ("undo.safetensors", base)):
        with safe_open(folder / file_name, framework="pt") as file:
            for entry in json.loads(file.metadata()["patches"]):
                values, whole = file.get_tensor(entry["name"] + "::values"), tensors[entry["name"]]
                assert list(whole.shape) == entry["shape"]
                assert str(values.dtype) == "torch." + entry["dtype"]
                if entry["sparse"]:
                    indices = file.get_tensor(entry["name"] + "::indices")
                    assert indices.dtype == torch.int32
                    assert bool((indices.diff() > 0).all())
                    whole.view(-1)[indices.long()] = values
                else:
                    whole.copy_(values.view(whole.shape))
        assert all(same_bits(tensors[n], wanted[n]) for n in wanted)
        assert not all(same_bits(on[n], base[n]) for n in base)


def test_merged_folds_operations_into_the_grafted_weights(tmp_path):
    model = pico("llama")
    neurons = sites(model, "neuron")
    site = next(iter(neurons.values()))
    step = Intervention(site, torch.tensor([2, 5]), "scale", torch.tensor(0.25))
    down = "model.layers.0.mlp.down_proj.weight"
    columns = Slice(Region.of((32, 48), "cols", [5, 6]), torch.full((2, 32), 0.5))
    graft = Graft.made(model, {down: columns}, operations=(step,))
    batch, before = pico_batch(model), state(model)
    folder = graft.export(tmp_path / "m", to="merged", model=model)
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        with graft.on(model):
            wanted = model(**batch).logits
        plain = model(**batch).logits
        found = type(model).from_pretrained(folder).eval()(**batch).logits
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    written = type(model).from_pretrained(folder).get_parameter(down)
    assert torch.equal(written[:, 5], torch.full((32,), 0.125))
    with graft.on(model), torch.no_grad():
        again = type(model).from_pretrained(graft.export(tmp_path / "on", to="merged", model=model)).eval()
        torch.testing.assert_close(again(**batch).logits, wanted, rtol=0, atol=1e-6)
        assert torch.equal(model(**batch).logits, wanted), "the model keeps the graft it had on"
    pinned = Graft.made(model, {}, operations=(Intervention(site, torch.tensor([2]), "pin", torch.tensor(1.0)),))
    with pytest.raises(RequestError, match="bias"):
        pinned.export(tmp_path / "n", to="merged", model=model)
    assert not (tmp_path / "n").exists()
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    for form in ("lora", "supertuning", "patch"):
        with pytest.raises(RequestError, match="merged"):
            graft.export(tmp_path / form, to=form, model=model)
