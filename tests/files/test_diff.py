"""What tuning changed, as a graft: full fine-tunes and PEFT adapters, live and in files."""

import pickle

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.delta import LowRank, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.seeds import generator
from neurograft.pipeline._narrow import narrow_change
from neurograft.pipeline.diff import diff
from neurograft.worlds.pico import pico


def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return type(model).from_pretrained(folder).eval()


def tuned_like(model, seed=0):
    """A copy with rows, columns, entries and whole tensors changed, one of each kind of weight."""
    rng = generator(seed, "tuned")
    other = type(model)(model.config).to(next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    shapes = [n for n, p in other.named_parameters() if p.dim() > 1 and len(p) > 3]
    with torch.no_grad():
        for i, name in enumerate(shapes):
            weight = other.get_parameter(name)
            noise = torch.randn(weight.shape, generator=rng).to(weight.dtype)
            flat = weight.view(len(weight), -1) if weight.dim() != 3 else weight.view(-1, weight.shape[-1])
            if i % 4 == 0:
                flat[2] += noise.view_as(flat)[2]
            elif i % 4 == 1:
                flat[:, 3] += noise.view_as(flat)[:, 3]
            elif i % 4 == 2:
                flat.view(-1)[::97] += 1.0
            else:
                weight += noise
    return other.eval()


def test_the_narrowest_form_is_found_by_its_bytes():
    base = torch.zeros(40, 30)

    def form(change, where=()):
        tuned = base.clone()
        if where:
            tuned[where] = 1.0
        else:
            change(tuned)
        found = narrow_change(base, tuned, (1, 40, 30))
        assert same_bits(found.on(base).region.read(tuned), found.values)
        return found.region.layout, len(found.region.ids)

    assert form(lambda w: w[3:5].fill_(1)) == ("rows", 2)
    assert form(None, (slice(None), [1, 7])) == ("cols", 2)
    assert form(lambda w: w.view(-1)[::50].fill_(1)) == ("flat", 24)
    assert form(lambda w: w.view(-1)[: 30 * 39].fill_(1)) == ("all", 0)
    assert form(lambda w: w[3, :29].fill_(1)) == ("rows", 1)  # 31 numbers' bytes against 29 numbers and ids
    assert narrow_change(base, base.clone(), (1, 40, 30)) is None
    signed = base.clone()
    signed[0, 0] = -0.0
    assert narrow_change(base, signed, (1, 40, 30)).region.ids.tolist() == [0]
    bank = torch.zeros(3, 40, 30)
    tuned = bank.clone()
    tuned[1, :, 4] = 1
    assert narrow_change(bank, tuned, (3, 40, 30)).region.ids.tolist() == [34]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "vit", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_fine_tune_comes_back_bit_for_bit(family, dtype, tmp_path):
    base = saved(pico(family, dtype=dtype), tmp_path / "base", max_shard_size="40KB")
    tuned = saved(tuned_like(base), tmp_path / "tuned")
    by_path = diff(tmp_path / "base", tmp_path / "tuned")
    live = diff(base, tuned)
    mixed = diff(base, tmp_path / "tuned")
    assert by_path.identity == live.identity == mixed.identity
    assert by_path.card["base"]["dtype"] == str(dtype).removeprefix("torch.")
    layouts = {d.region.layout for d in by_path.deltas.values()}
    assert {"rows", "cols", "flat", "all"} <= layouts
    before, wanted = state(base), state(tuned)
    graft = Graft.load(by_path.save(tmp_path / "graft"))
    with graft.on(base):
        assert equal(state(base), wanted)
    assert equal(state(base), before)


def test_only_what_differs_is_kept_and_read_below_the_grafts_on_the_base():
    base, tuned = pico("llama"), pico("llama")
    tuned.model.layers[0].mlp.up_proj.weight.data[5] += 1.0
    graft = diff(base, tuned)
    assert list(graft.deltas) == ["model.layers.0.mlp.up_proj.weight"]
    other = pico("llama")
    other.model.norm.weight.data += 1.0
    with diff(base, other).on(base):
        assert diff(base, tuned).identity == graft.identity
    assert diff(base, pico("llama")).empty


def test_running_statistics_come_along():
    base, tuned = pico("resnet"), pico("resnet")
    buffers = [n for n, b in tuned.named_buffers() if n.endswith("running_mean")]
    tuned.get_buffer(buffers[0]).add_(1.0)
    counter = next(b for n, b in tuned.named_buffers() if n.endswith("num_batches_tracked"))
    counter += 3
    graft, before = diff(base, tuned), state(base)
    assert list(graft.deltas) == [buffers[0]]
    assert len(graft.card["integers_that_differ"]) == 1
    with graft.on(base):
        assert same_bits(base.get_buffer(buffers[0]), tuned.get_buffer(buffers[0]))
    assert equal(state(base), before)


def test_a_new_head_on_an_encoder_comes_as_new_parameters(tmp_path):
    config = pico("bert").config
    saved(BertModel(config), tmp_path / "base")
    start = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    tuned = saved(tuned_like(start), tmp_path / "tuned")
    graft = diff(tmp_path / "base", tmp_path / "tuned")
    assert {n for n, d in graft.deltas.items() if isinstance(d, New)} == {"classifier.weight", "classifier.bias"}
    assert "encoder.layer.0.attention.self.query.weight" in graft.deltas
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    with graft.on(fresh):
        assert equal(state(fresh), state(tuned))


def test_untied_weights_and_appended_tokens(tmp_path):
    base = saved(pico("llama", tie_word_embeddings=True), tmp_path / "base")
    config = type(base.config)(**{**base.config.to_dict(), "tie_word_embeddings": False})
    apart = type(base)(config)
    apart.load_state_dict(base.state_dict())
    apart.lm_head.weight.data[3] = 1.0
    apart.save_pretrained(tmp_path / "apart")
    for first, second in ((base, apart), (tmp_path / "base", tmp_path / "apart")):
        graft = diff(first, second)
        assert list(graft.deltas) == ["lm_head.weight"]
        with graft.on(base):
            assert equal(state(base), state(apart))
        assert base.lm_head.weight is base.model.embed_tokens.weight
    longer = type(base).from_pretrained(tmp_path / "base")
    longer.resize_token_embeddings(70, mean_resizing=False)
    graft = diff(base, longer)
    assert graft.deltas["model.embed_tokens.weight"].after == 64
    with graft.on(base):
        assert equal(state(base), state(longer))
    longer.model.embed_tokens.weight.data[0] += 1
    with pytest.raises(RequestError, match="new rows after unchanged ones"):
        diff(base, longer)


LORAS = {
    "llama": (
        "llama",
        LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}),
    ),
    "rslora": ("llama", LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules="all-linear")),
    "gpt2": ("gpt2", LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_bias=True)),
    "experts": (
        "mixtral",
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "tokens": (
        "llama",
        LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices={"embed_tokens": [9, 4]}),
    ),
    "biases": ("gpt2", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
    "its biases": ("qwen2", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], bias="lora_only")),
    "embedding": ("llama", LoraConfig(r=2, target_modules=["embed_tokens", "up_proj"])),
    "head": ("bert", LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])),
    "convolution": ("vit", LoraConfig(r=2, target_modules=["projection", "query"])),
}


def stirred(model, config, seed=0):
    """An adapter with random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                scale = 1.0 if "_magnitude" in name or "ia3" in name else 0.0
                parameter.data = scale * parameter.data + 0.1 * torch.randn(parameter.shape)
    return wrapped.eval()


@pytest.mark.parametrize("case", sorted(LORAS))
def test_a_lora_is_its_factors(case, tmp_path):
    family, config = LORAS[case]
    base = saved(pico(family), tmp_path / "base")
    wrapped = stirred(type(base).from_pretrained(tmp_path / "base"), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    graft, before = diff(base, tmp_path / "adapter"), state(base)
    assert graft.identity == diff(tmp_path / "base", tmp_path / "adapter").identity == diff(base, wrapped).identity
    kinds = {type(d) for d in graft.deltas.values()}
    assert LowRank in kinds
    assert kinds <= {LowRank, Slice}
    wanted = state(wrapped.merge_and_unload())
    with Graft.load(graft.save(tmp_path / "graft")).on(base):
        found = state(base)
    assert equal(state(base), before)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-7)
    moved = [n for n in wanted if not torch.equal(wanted[n], before[n])]
    assert moved == [n for n in found if not torch.equal(found[n], before[n])]


OTHERS = {
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "pissa": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "tokens": TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"]),
}


@pytest.mark.parametrize("case", sorted(OTHERS))
def test_other_adapters_come_through_their_merged_weights(case, tmp_path):
    base = saved(pico("llama"), tmp_path / "base")
    wrapped = stirred(type(base).from_pretrained(tmp_path / "base"), OTHERS[case])
    if case != "pissa":  # a saved one is loaded on the base's residual by PEFT itself
        wrapped.save_pretrained(tmp_path / "adapter")
        assert diff(base, tmp_path / "adapter").identity == diff(tmp_path / "base", wrapped).identity
    graft, before = diff(base, wrapped), state(base)
    wanted = state(wrapped.merge_and_unload())
    with graft.on(base):
        assert equal(state(base), wanted)
    assert equal(state(base), before)
    assert not equal(before, wanted)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
)
def test_prompts_are_no_weight_change(config, tmp_path):
    base = saved(pico("llama"), tmp_path / "base")
    with pytest.raises(RequestError, match="changes no weight"):
        diff(base, get_peft_model(type(base).from_pretrained(tmp_path / "base"), config))


class Trap:
    """A pickle that says when it is read."""

    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


def test_pickles_are_refused_unread(tmp_path):
    base = saved(pico("llama"), tmp_path / "base")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "tuned" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(RequestError, match="never read"):
        diff(base, tmp_path / "tuned")
    stirred(type(base).from_pretrained(tmp_path / "base"), LORAS["llama"][1]).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(RequestError, match="never read"):
        diff(base, tmp_path / "adapter")
    assert not Trap.sprung


def test_bad_input_is_refused(tmp_path):
    base = saved(pico("llama"), tmp_path / "base")
    with pytest.raises(RequestError, match="share no tensor"):
        diff(base, pico("gpt2"))
    with pytest.raises(RequestError, match="where no folder is"):
        diff(base, tmp_path / "nowhere")
    stirred(pico("gpt2"), LORAS["gpt2"][1]).save_pretrained(tmp_path / "foreign")
    with pytest.raises(RequestError, match="does not fit"):
        diff(base, tmp_path / "foreign")
    wrapped = stirred(type(base).from_pretrained(tmp_path / "base"), LORAS["llama"][1])
    with pytest.raises(RequestError, match="carries adapter layers"):
        diff(wrapped.get_base_model(), wrapped)
    wrapped.merge_adapter()
    with pytest.raises(RequestError, match="merged PeftModel"):
        diff(base, wrapped)
    saved(pico("llama"), tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RequestError, match="truncated"):
        diff(base, tmp_path / "cut")
    both = load_file(tmp_path / "base" / "model.safetensors")
    tied = saved(pico("llama", tie_word_embeddings=True), tmp_path / "tied")
    save_file({**both, "lm_head.weight": both["lm_head.weight"] + 1}, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(RequestError, match="two different tensors"):
        diff(tied, tmp_path / "tied")


def test_peft_gives_what_the_exported_graft_was(tmp_path):
    """Graft -> LoRA -> PeftModel -> graft: the same change."""
    base = saved(pico("llama"), tmp_path / "base")
    tuned = type(base).from_pretrained(tmp_path / "base")
    tuned.model.layers[0].mlp.up_proj.weight.data[5] += 0.5
    graft = diff(base, tuned)
    folder = graft.export(tmp_path / "lora", to="lora", model=base)
    back = diff(base, PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), folder))
    with graft.on(base):
        wanted = state(base)
    with back.on(base):
        assert equal(state(base), wanted)
