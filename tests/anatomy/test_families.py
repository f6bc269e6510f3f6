"""Promise 10 as a law: the anatomy of every family is true, for every kind of unit it has."""

import json
import re
from contextlib import nullcontext
from functools import cache

import pytest
import torch

from neurograft.anatomy._silence import outputs
from neurograft.anatomy.describe import anatomy
from neurograft.anatomy.projections import projections
from neurograft.anatomy.sites import sites
from neurograft.anatomy.verify import verify
from neurograft.core.errors import RequestError
from neurograft.core.taps.tap import change
from neurograft.core.units import KINDS, Site
from neurograft.worlds.pico import families, pico, pico_batch

# Kinds that a family does not have, and why. A kind that appears all the same fails too.
LACKS = {
    "token": ("it reads no words", "ast convnext dinov2 dit hubert resnet swin unet vit wav2vec2"),
    "bias": (
        "its linear layers and norms have no bias",
        "gemma2 gemma3 llama mistral mixtral olmo2 olmoe phi3 qwen3 qwen3_moe smollm3 t5",
    ),
    "head": ("it has no attention", "convnext resnet"),
    "neuron": ("it has no FFN", "resnet"),
    "norm": ("its norms have no gain of their own", "dit"),
    "expert": ("it is no mixture of experts", " ".join(set(families()) - {"mixtral", "olmoe", "qwen3_moe"})),
}
# LLaVA reads the image tower before this norm, which serves its class token only.
UNREACHED = {"llava": {"model.vision_tower.post_layernorm/norm"}}
TAPPED = {"row", "column", "neuron", "head", "channel", "layer"}


@cache
def model_of(family: str) -> torch.nn.Module:
    return pico(family, dtype=torch.float64)


def kinds_of(family: str) -> list[str]:
    return [k for k in KINDS if family not in LACKS.get(k, ("", ""))[1].split()]


@pytest.mark.parametrize("family", families())
def test_silencing_in_the_weights_equals_silencing_at_the_tap(family):
    model, batch = model_of(family), pico_batch(family)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    rows = verify(model, batch, limit=1) + verify(model, batch, kinds=_present(family, "neuron", "head"), limit=2)
    failed = [row for row in rows if row.status == "failed"]
    assert not failed, failed
    assert {row.site for row in rows if row.status == "unreached"} <= UNREACHED.get(family, set())
    assert {row.kind for row in rows} == set(kinds_of(family)), "a kind appeared or went missing"
    equal = {row.kind for row in rows if row.status == "equal"}
    assert equal >= TAPPED & set(kinds_of(family))
    assert all(row.error <= 1e-9 < 1e-7 < row.moved for row in rows if row.status == "equal")


def _present(family: str, *kinds: str) -> list[str]:
    return [k for k in kinds if k in kinds_of(family)]


@pytest.mark.parametrize("family", families())
def test_no_two_units_of_a_kind_share_a_number(family):
    model = model_of(family)
    for kind in kinds_of(family):
        count = {name: torch.zeros(p.numel(), dtype=torch.int32) for name, p in model.named_parameters()}
        for site in sites(model, kind).values():
            assert site.n > 0
            for part in site.parts:
                assert part.n == site.n
                count[part.param].index_add_(
                    0,
                    part.flat(torch.arange(site.n)).reshape(-1),
                    torch.tensor([1], dtype=torch.int32).expand(site.n * part.size),
                )
        twice = [name for name, c in count.items() if bool((c > 1).any())]
        assert not twice, (kind, twice)


@pytest.mark.parametrize("family", families())
def test_names_layers_and_plain_data(family):
    model = model_of(family)
    found = anatomy(model)
    names = dict(model.named_modules())
    assert found.layers
    assert found.note == ""
    assert len(found.branches) == len(found.layers) == len(set(found.layers))
    assert all(module in names for branches in found.branches for module in branches.values())
    for kind in kinds_of(family):
        for name, site in sites(model, kind).items():
            assert name == site.name
            assert site.kind == kind
            assert re.fullmatch(rf".*/{kind}(@\w+)?", name)
            inside = [i for i, layer in enumerate(found.layers) if name.startswith((f"{layer}.", f"{layer}/"))]
            assert site.layer == (inside[-1] if inside else None)
            assert Site.from_dict(json.loads(json.dumps(site.as_dict()))) == site


def _seen(model: torch.nn.Module, batch: dict, site: Site, changed: Site | None = None, how=None) -> torch.Tensor:
    """Return what passes a site's tap for the first time, while another site's activation is changed."""
    found: list[torch.Tensor] = []
    with change(model, {changed.name: changed}, lambda name, x: how(x)) if changed else nullcontext():
        with change(model, {site.name: site}, lambda name, x: found.append(x.detach().clone())):
            outputs(model, batch)
    return found[0]


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def _nudge(x: torch.Tensor) -> torch.Tensor:
    moved, at = x.clone(), x.shape[1] // 2
    moved[:, at] += 1 + x[:, at].sin()
    return moved


def _double_batch(family: str) -> dict:
    return {k: v.double() if v.is_floating_point() else v for k, v in pico_batch(family).items()}


@pytest.mark.parametrize("family", [f for f in families() if "neuron" in kinds_of(f)])
def test_gates_pass_an_activation_and_ups_do_not(family):
    """Silencing a row of either equals silencing its output, so a swapped pair would not show there."""
    model, batch = model_of(family), _double_batch(family)
    try:
        gates = sites(model, "neuron", at="gate")
    except RequestError:
        return  # a plain FFN, or experts, of which nothing outside sees the gates
    for name in list(gates)[:1]:
        act, up = (
            sites(model, "neuron", at=at)[name.replace("@gate", end)] for at, end in (("act", ""), ("up", "@up"))
        )
        base = _seen(model, batch, act)
        torch.testing.assert_close(_seen(model, batch, act, up, _double), 2 * base, rtol=1e-9, atol=1e-12)
        assert (_seen(model, batch, act, gates[name], _double) - 2 * base).abs().max() > 1e-3 * base.abs().max()


@pytest.mark.parametrize("family", [f for f in families() if "head" in kinds_of(f)])
def test_queries_keys_and_values_are_not_taken_for_each_other(family):
    """A head is linear in its values, a query works at its own position and a key at others."""
    model, batch = model_of(family), _double_batch(family)
    heads = sites(model, "head")
    (name, out), *_ = heads.items()
    base = _seen(model, batch, out)
    found = {}
    for of in ("queries", "keys", "values"):
        try:
            found[of] = projections(model, of)[name]
        except RequestError:
            assert of == "queries"  # grouped with the keys and values they share
            assert family == "falcon"
    torch.testing.assert_close(_seen(model, batch, out, found["values"], _double), 2 * base, rtol=1e-9, atol=1e-12)
    for of in found.keys() - {"values"}:
        moved = (_seen(model, batch, out, found[of], _nudge) - base).abs().flatten(2).amax(2) / base.abs().max()
        here = torch.arange(moved.shape[1]) == moved.shape[1] // 2
        assert moved[:, here].max() > 1e-5 or of == "keys"
        assert (moved[:, ~here].max() > 1e-5) == (of == "keys")


def test_gated_dinov2_has_neurons():
    model = pico("dinov2", use_swiglu_ffn=True, dtype=torch.float64)
    assert anatomy(model).note == ""
    assert anatomy(model).branches[0].keys() == {"attention", "ffn"}
    rows = verify(model, {k: v.double() if v.is_floating_point() else v for k, v in pico_batch(model).items()},
                  kinds=["neuron", "layer"])  # fmt: skip
    assert {row.kind: row.status for row in rows if row.status != "read"} == {"neuron": "equal", "layer": "equal"}


def test_linear_layers_of_a_known_block_that_no_entry_speaks_of_are_named():
    model = pico("llama")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.SiLU(), torch.nn.Linear(48, 32))
    assert anatomy(model).note == "model.layers.#.mlp: the family's file does not know its linear layers"
    with pytest.raises(RequestError, match=r"could not be read: model\.layers\.#\.mlp"):
        sites(model, "neuron")


# Neurons of an FFN and heads of an attention where they are not 48 and 4, as the pico configs say.
NEURONS = {
    "bloom": {128}, "convnext": {64, 128}, "decision_transformer": {128}, "dinov2": {64}, "dit": {32, 128},
    "falcon": {128}, "gpt2": {128}, "llava": {32, 48}, "qwen3_moe": {24}, "swin": {32, 64}, "unet": {64, 128},
}  # fmt: skip
HEADS = {"swin": {2, 4}, "unet": {4}}
SHARED = {"falcon", "gemma2", "gemma3", "llama", "mistral", "mixtral", "olmo2", "olmoe", "phi3", "qwen2", "qwen3",
          "qwen3_moe", "smollm3"}  # fmt: skip


@pytest.mark.parametrize("family", families())
def test_counts_match_the_config(family):
    model, have = model_of(family), kinds_of(family)
    if "neuron" in have:
        assert {s.n for s in sites(model, "neuron").values()} == NEURONS.get(family, {48})
    if "head" in have:
        found = sites(model, "head").values()
        assert {s.n for s in found} == HEADS.get(family, {4})
        shared = {s.n for s in sites(model, "head", at="kv").values()}
        assert shared == ({2, 4} if family == "llava" else {2} if family in SHARED else {s.n for s in found})
        assert all(len(s.parts) < 4 for s in found) or family not in SHARED


def test_verification_leaves_the_model_and_the_global_generator_as_they_were():
    model, batch = pico("bart"), pico_batch("bart")
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    verify(model, batch, limit=1)
    assert model.training
    assert bool((torch.get_rng_state() == state).all())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_wrong_family_file_is_found_out(monkeypatch):
    from neurograft.anatomy import _blocks

    model, batch = pico("gpt_neox", dtype=torch.float64), pico_batch("gpt_neox")
    right = _blocks.fused_spans
    monkeypatch.setattr(_blocks, "fused_spans", lambda layout, *sizes: right("stacked", *sizes))
    rows = verify(model, batch, kinds=["head"])
    assert {row.status for row in rows if "@" not in row.site} == {"failed"}


def test_a_wrong_neuron_order_is_found_out(monkeypatch):
    from neurograft.anatomy import _blocks

    model, batch = pico("phi3", dtype=torch.float64), pico_batch("phi3")
    right = _blocks._halves
    monkeypatch.setattr(_blocks, "_halves", lambda m, module, interleaved: right(m, module, interleaved=True))
    assert "failed" in {row.status for row in verify(model, batch, kinds=["neuron"])}


def test_tied_heads_are_tokens_and_no_number_silences_a_logit_alone():
    tied, untied = pico("gpt2"), pico("gpt2", tie_word_embeddings=False)
    assert not any("lm_head" in name for kind in ("row", "column", "weight") for name in sites(tied, kind))
    assert any("lm_head" in name for name in sites(untied, "row"))
    (head,) = sites(tied, "token", at="head").values()
    assert head.parts[0].param == "transformer.wte.weight"
    assert head.writes == ()
    (free,) = sites(untied, "token", at="head").values()
    assert free.writes == (0,)


def test_layers_that_share_their_weights_are_one_site_that_fires_often():
    model, batch = pico("albert", dtype=torch.float64), pico_batch("albert")
    found = sites(model, "neuron")
    assert len(found) == 1
    rows = verify(model, batch, kinds=["neuron", "head", "layer"])
    assert {row.status for row in rows} <= {"equal", "read"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"units": "neurn"}, "did you mean 'neuron'"),
        ({"units": "neuron", "at": "gated"}, "did you mean 'gate'"),
        ({"units": "head", "layers": [7]}, "-2 to 1"),
        ({"units": "head", "layers": "model.layers.3"}, "did you mean 'model.layers."),
        ({"units": "head", "match": "*.self_atn/head"}, "did you mean"),
        ({"units": "expert"}, "which has none"),
        ({"units": "row", "at": "wieght"}, "did you mean 'weight'"),
        ({"units": "block", "block": 7}, "use divisors such as"),
        ({"units": "row", "block": 8}, "units='block'"),
        ({"units": "norm", "at": "act"}, "leave at out"),
        ({"units": "layer", "at": "atention"}, "did you mean 'attention'"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_answered_with_what_would_have_been_right(options, words):
    with pytest.raises(RequestError, match=re.escape(words)):
        sites(model_of("llama"), **options)


def test_blocks_that_no_file_knows_beside_known_ones_are_named():
    model = pico("llava")
    tower = model.model.vision_tower.encoder.layers[0]
    type(tower).__name__, name = "ForeignLayer", type(tower).__name__
    try:
        found = anatomy(model)
    finally:
        type(tower).__name__ = name
    assert found.note == "model.vision_tower.encoder.layers.#: no family file knows ForeignLayer"
    assert found.layers == ["model.language_model.layers.0", "model.language_model.layers.1"]


def test_a_model_under_peft_keeps_its_anatomy():
    peft = pytest.importorskip("peft")
    model, batch = pico("llama", dtype=torch.float64), pico_batch("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).double()
    assert anatomy(wrapped).note == ""
    (site,) = sites(wrapped, "neuron", layers=1).values()
    assert site.name == "base_model.model.model.layers.1.mlp/neuron"
    assert site.parts[-1].param == "base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"
    assert {row.status for row in verify(wrapped, batch, kinds=["neuron", "head"])} == {"equal"}


def test_plain_ffns_have_no_gate_and_say_so():
    with pytest.raises(RequestError, match="one of act, up"):
        sites(model_of("gpt2"), "neuron", at="gate")


def test_filters():
    model = model_of("llama")
    assert list(sites(model, "head", layers=-1)) == ["model.layers.1.self_attn/head"]
    assert list(sites(model, "head", layers=["model.layers.0"])) == ["model.layers.0.self_attn/head"]
    assert list(sites(model, "row", match="*.0.*.q_proj/*")) == ["model.layers.0.self_attn.q_proj/row"]
    assert None in {s.layer for s in sites(model, "row").values()}
    assert None not in {s.layer for s in sites(model, "row", layers=[0, 1]).values()}
