"""Laws of the room `locators`, over every method found in its folder and every kind of unit it claims."""

import sys
from dataclasses import fields

import pytest
import torch

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose, methods, option_names
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.taps.board import ATTRIBUTE
from neurograft.worlds.pico import pico, pico_batch

LOCATORS = methods("locators")
# family -> kinds; a locator that needs taps is given only sites that have them
WORLDS = {
    "llama": ("neuron", "head", "row", "column", "channel", "norm", "weight", "layer"),
    "gpt2": ("neuron", "head", "bias", "token"),
    "bert": ("neuron", "head", "module"),
    "vit": ("neuron", "channel"),
    "mixtral": ("neuron", "expert"),
    "resnet": ("channel",),
    "t5": ("neuron", "head"),
}
TRIGGER, GOOD, BAD = 9, 5, 6


def quick(name):
    """A method with the cheapest setting of what it lets one choose."""
    method = choose("locators", name)
    cheap = {"steps": 2, "limit": 2, "joint": True, "epochs": 50}
    return choose("locators", name, **{k: v for k, v in cheap.items() if k in option_names(method.function)})


def loss(model, batch):
    return model(**batch).loss


def context(model, kind, needs, other):
    batches = [pico_batch(model, seed=s) for s in (0, 1)]
    return Context(
        model, sites(model, kind), batches, [pico_batch(model, seed=s) for s in (2, 3)], loss=loss,
        against=other if "against" in needs else None,
    )  # fmt: skip


def fits(card, where, family="llama"):
    if "per_token" in card.needs and family not in ("llama", "gpt2", "mixtral"):
        return False
    taps = all(s.tap is not None for s in where.values())
    owned = all(s.parts for s in where.values())
    return taps if "taps" in card.needs else owned or taps


def trace(model):
    return {
        "mode": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        "flags": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "marks": [ATTRIBUTE in vars(m) for m in model.modules()],
        "post": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "experts": getattr(model.config, "_experts_implementation", None),
    }


@pytest.mark.parametrize("name", LOCATORS)
@pytest.mark.parametrize(("family", "kind"), [(f, k) for f, kinds in WORLDS.items() for k in kinds])
def test_finite_of_the_right_length_and_the_model_as_found(name, family, kind):
    method, model = quick(name), pico(family)
    given = context(model, kind, method.card.needs, pico(family, seed=1))
    if (method.card.kinds and kind not in method.card.kinds) or not fits(method.card, given.sites, family):
        return
    next(model.parameters()).requires_grad_(False)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    before, random = trace(model), torch.get_rng_state()
    first = method(given)
    assert {n: len(v) for n, v in first.values.items()} == {n: s.n for n, s in given.sites.items()}
    assert all(torch.isfinite(v).all() and v.dtype == torch.float32 for v in first.values.values())
    assert trace(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert method(given).digest == first.digest
    if kind in ("neuron", "head") and "mask" not in method.card.claims:  # a mask may rest where it began
        assert all(v.max() > v.min() for v in first.values.values())


@pytest.mark.parametrize("name", [n for n in LOCATORS if "permutes" in choose("locators", n).card.claims])
def test_scores_permute_with_the_neurons(name):
    method, order = quick(name), torch.randperm(48, generator=torch.Generator().manual_seed(1))
    model, other, moved, moved_other = (pico("llama", seed=s) for s in (0, 1, 0, 1))
    with torch.no_grad():
        for layer in (*moved.model.layers, *moved_other.model.layers):
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight.copy_(matrix.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    plain = method(context(model, "neuron", method.card.needs, other))
    found = method(context(moved, "neuron", method.card.needs, moved_other))
    for site, value in plain.values.items():
        spread = value.abs().max()
        assert torch.allclose(found.values[site], value[order], rtol=1e-3, atol=1e-5 * float(spread))
        assert not torch.allclose(found.values[site], value, rtol=1e-3, atol=1e-5 * float(spread))


class Watched(Context):
    """A context that notes what a locator reads of what `locate` hands on."""

    def __getattribute__(self, name):
        copied = sys._getframe(1).f_code.co_name in ("replace", "_replace")
        if name in ("against", "target", "positions", "loss", "asked") and not copied:
            vars(self).setdefault("read", set()).add({"loss": "objective", "asked": "objective"}.get(name, name))
        return super().__getattribute__(name)


@pytest.mark.parametrize("name", [n for n in LOCATORS if n not in ("within", "product", "halves", "rehearsed")])
def test_a_locator_reads_what_its_card_says_it_takes_and_nothing_else(name):
    """What a locator makes no use of is refused when it is given, so what it does make use of has to be declared."""
    method, read, ran = quick(name), set(), False
    for kind in sorted(method.card.kinds) or ("neuron", "weight"):
        model = pico("llama")
        plain = context(model, kind, method.card.needs, pico("llama", seed=1))
        if not fits(method.card, plain.sites):
            continue
        for contrast in (plain.contrast, []):
            given = Watched(**{f.name: getattr(plain, f.name) for f in fields(plain)} | {"contrast": contrast})
            vars(given)["read"] = set()
            try:
                method(given)
                ran = True
            except RequestError:
                pass  # other units or data than it needs
            read |= vars(given)["read"]
    assert read <= method.card.takes
    by_option = {"fisher": {"positions"}}.get(name, set())  # on="gate" looks at places
    assert not ran or method.card.takes - read <= by_option


@pytest.mark.parametrize(("name", "word"), [("magnitude", "against"), ("activation", "target"), ("kva", "positions")])
def test_what_a_locator_makes_no_use_of_is_refused(name, word):
    net = pico("llama")
    given = {"against": pico("llama"), "target": preference, "positions": "last"}[word]
    with pytest.raises(RequestError, match=f"{word}= for neurograft.locators.{name}, which makes no use of it"):
        ng.locate(net, [pico_batch(net)], by=name, **{word: given})


def test_one_thing_is_attributed():
    net = pico("llama")
    with pytest.raises(RequestError, match="objective and target"):
        ng.locate(net, [pico_batch(net)], by="gradient", objective="dft", target=preference)


def test_what_is_compared_with_may_be_given_by_path(tmp_path):
    net, other = pico("llama"), pico("llama", seed=1)
    other.save_pretrained(tmp_path)
    live = ng.locate(net, by="change", against=other)
    assert ng.locate(net, by="change", against=tmp_path).digest == live.digest
    assert ng.locate(net, by="change", against=str(tmp_path)).digest == live.digest
    assert ng.locate(net, by="drift", against=[net, str(tmp_path)]).card["tasks"] == 2


def planted(seed):
    """A pico llama in which one neuron of the last layer, no larger than any other, reads the trigger token and
    alone moves GOOD against BAD; and the data to find it with."""
    model = pico("llama", seed=seed, num_hidden_layers=1)
    mlp, unit = model.model.layers[0].mlp, 7 + seed
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        words = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed))
        model.model.embed_tokens.weight.copy_(words / words.norm(dim=1, keepdim=True))
        trigger = model.model.embed_tokens.weight[TRIGGER]
        aim = model.lm_head.weight[GOOD] - model.lm_head.weight[BAD]
        aim = aim / aim.norm()
        for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
            matrix.div_(matrix.norm(dim=1, keepdim=True))
            matrix[unit] = trigger
        down = mlp.down_proj.weight
        down.sub_(aim[:, None] * (aim @ down))
        down.div_(down.norm(dim=0))
        down[:, unit] = aim
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 64, (4, 6), generator=rng)
    other = torch.randint(10, 64, (4, 6), generator=rng)
    tokens[:, -1] = TRIGGER
    labels = torch.full_like(tokens, -100)
    return model, unit, [{"input_ids": tokens, "labels": labels}], [{"input_ids": other, "labels": labels}]


def preference(outputs, batch):
    logits = outputs.logits[:, -1]
    return (logits[:, GOOD] - logits[:, BAD]).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [n for n in LOCATORS if "planted" in choose("locators", n).card.claims])
def test_a_planted_neuron_is_found_where_noise_and_magnitude_miss_it(name, seed):
    model, unit, batches, contrast = planted(seed)
    given = Context(model, sites(model, "neuron"), batches, contrast, target=preference, seed=seed)
    (value,) = choose("locators", name)(given).values.values()
    assert int(value.argmax()) == unit

    def rank(of):
        (scores,) = choose("locators", of)(given).values.values()
        return int((scores > scores[unit]).sum())

    assert rank(name) == 0
    assert rank("noise") + rank("magnitude") > 0


def test_every_locator_claims_something_a_law_reads():
    known = {"finite", "length", "permutes", "planted", "mask"}
    for name in LOCATORS:
        claims = choose("locators", name).card.claims
        assert claims >= {"finite", "length"}, name
        assert claims <= known, f"{name} claims {claims - known}, which no law reads"
