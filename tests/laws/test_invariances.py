"""A user's numbers do not hang on what does not matter: padding, order, state, random numbers, kernels, threads.

Batch sizes are held by `tests/locators/test_batching.py`. Methods are found in their folders.
"""

from contextlib import suppress

import pytest
import torch
from torch import nn

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose, methods, option_names
from neurograft.core.context import Context
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.worlds.pico import pico

LOCATORS = methods("locators")
AUDITS = [n for n in methods("audits") if choose("audits", n).card.claims >= {"empty_is_zero", "noise_floor"}]
LENGTHS = (9, 5, 7, 9, 4, 6)
KINDS = ("neuron", "head", "channel", "row", "module", "layer", "weight")
# Whose numbers the order of the examples makes, and why.
ORDERED = {
    "dcm": "learns example after example",
    "drift": "the tasks are parts of the data, one after the other",
    "rehearsed": "learns example after example",
    "shutting": "goes a step for each batch along its path",
    "value": "every fifth rollout is left out of the fit",
}


def quick(name, **more):
    """A locator with the cheapest setting, and a kind of unit that it scores."""
    method = choose("locators", name)
    cheap = {"steps": 2, "joint": True, "epochs": 10, "limit": 2, "batch_size": 4, **more}
    known = option_names(method.function)
    kind = next(k for k in KINDS if not method.card.kinds or k in method.card.kinds)
    return choose("locators", name, **{k: v for k, v in cheap.items() if k in known}), kind


def at_of(kind):
    return "residual" if kind == "layer" else None


def rows(seed):
    """Six texts of different lengths, as examples; the first two tokens are prompt."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for length in LENGTHS:
        tokens = torch.randint(3, 60, (length,), generator=rng)
        labels = tokens.masked_fill(torch.arange(length) < 2, -100)
        found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return found


def batched(examples, size=4, *, left=0, right=0, junk=False):
    """Examples in batches, with padding on either side beside what their lengths ask for (on the right)."""
    rng, found = torch.Generator().manual_seed(9), []
    for i in range(0, len(examples), size):
        part = examples[i : i + size]
        wide = max(len(e["input_ids"]) for e in part)
        batch = {}
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            short = [wide - len(e[name]) for e in part]
            pads = [(left + s, right) if left else (0, right + s) for s in short]
            batch[name] = torch.stack([nn.functional.pad(e[name], p, value=fill) for e, p in zip(part, pads)])
        if junk:
            noise = torch.randint(3, 60, batch["input_ids"].shape, generator=rng)
            batch["input_ids"] = torch.where(batch["attention_mask"] == 0, noise, batch["input_ids"])
        found.append(batch)
    return found


def scores(name, model, other, sides, **more):
    method, kind = quick(name, **more)
    where = sites(model, kind, at=at_of(kind))
    if kind != "layer":
        where = dict([pair for pair in where.items() if pair[1].layer == 1][:2])
    against = other if "against" in method.card.needs else None
    return method(Context(model, where, *sides, asked=choose("objectives", "auto"), against=against)).values


def close(found, expected, rtol=2e-3, spread=1e-3):
    for site, value in expected.items():
        bar = spread * float(value.abs().max()) + 1e-9
        torch.testing.assert_close(found[site].float(), value.float(), rtol=rtol, atol=bar)


@pytest.mark.parametrize("name", LOCATORS)
def test_padding_is_nothing(name):
    """Its side, its amount, the tokens under it."""
    model, other, sides = pico("llama"), pico("llama", seed=1), (rows(1), rows(2))
    plain = scores(name, model, other, [batched(s) for s in sides])
    for how in ({"right": 7, "junk": True}, {"left": 1, "junk": True}, {"left": 7}):
        close(scores(name, model, other, [batched(s, **how) for s in sides]), plain)


@pytest.mark.parametrize("name", [n for n in LOCATORS if n not in ORDERED])
def test_the_order_of_rows_and_of_batches_is_nothing(name):
    model, other, sides, order = pico("llama"), pico("llama", seed=1), (rows(1), rows(2)), (3, 1, 5, 0, 4, 2)
    plain = scores(name, model, other, [batched(s) for s in sides], limit=6)
    close(scores(name, model, other, [batched([s[i] for i in order]) for s in sides], limit=6), plain)
    close(scores(name, model, other, [batched(s, 2)[::-1] for s in sides], limit=6), plain)


@pytest.mark.parametrize("name", LOCATORS)
def test_the_kernel_and_the_number_of_threads_are_nothing(name):
    sides, threads = [batched(rows(1)), batched(rows(2))], torch.get_num_threads()
    model, other = pico("llama"), pico("llama", seed=1)
    model.set_attn_implementation("sdpa")
    plain = scores(name, model, other, sides)
    model.set_attn_implementation("eager")
    try:
        torch.set_num_threads(3 - min(threads, 2))
        close(scores(name, model, other, sides), plain)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LOCATORS)
def test_the_dtype_of_the_base_is_little(name):
    """float64 agrees with float32 to two in a thousand."""
    found = []
    for dtype in (torch.float32, torch.float64):
        model, other = pico("llama", dtype=dtype), pico("llama", seed=1, dtype=dtype)
        found.append(scores(name, model, other, [batched(rows(1)), batched(rows(2))]))
    close(found[1], found[0])


def located(name, model, other, data, **options):
    method, kind = quick(name)
    sides = (
        {"positive": data[0], "negative": data[1]} if name == "contrast" or "contrast" in method.card.needs else data[0]
    )
    if "groups" in method.card.needs:
        sides = {"one": data[0], "two": data[1]}
    against = other if "against" in method.card.needs else None
    return ng.locate(
        model,
        sides,
        by=method,
        units=kind,
        at=at_of(kind),
        layers=None if kind == "layer" else [1],
        against=against,
        **options,
    )


@pytest.mark.parametrize("name", LOCATORS)
def test_what_the_model_and_the_process_were_at_is_nothing_and_is_left(name):
    """Training mode, frozen parameters, gradients that lie around, activation checkpointing, random numbers drawn, an
    audit that ran before."""
    model, other, data = pico("llama"), pico("llama", seed=1), (rows(1), rows(2))
    plain = located(name, model, other, data)
    model.train().requires_grad_(False)
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    held = [torch.ones_like(p) for p in model.parameters()]
    for parameter, grad in zip(model.parameters(), held):
        parameter.grad = grad
    choose("audits", "gain").function(model, Graft(), batched(rows(3)))
    modes = [m.training for m in model.modules()]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert located(name, model, other, data).digest == plain.digest
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), held))


@pytest.mark.parametrize("name", [n for n in LOCATORS if "labels" in choose("locators", n).card.needs])
def test_an_example_without_a_label_is_nothing(name):
    model, other, data = pico("llama"), pico("llama", seed=1), (rows(1), rows(2))
    if "contrast" in choose("locators", name).card.needs:
        return  # rows come in pairs or as sides there
    blank = {**data[0][1], "labels": torch.full_like(data[0][1]["labels"], -100)}
    plain, more = data[0], [*data[0][:3], blank, *data[0][3:]]
    expected = located(name, model, other, (plain, data[1])).values
    for size in (1, 4):
        found = located(name, model, other, (more, data[1]), batch_size=size)
        close(found.values, expected)
        assert found.card["unlabelled"] == 1


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize("name", LOCATORS)
def test_a_batch_that_fails_midway_leaves_the_model_as_found(name):
    model, other, data = pico("llama"), pico("llama", seed=1), (rows(1), rows(2))
    model.train()
    next(model.parameters()).requires_grad_(False)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    forward, calls = type(model).forward, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Boom
        return forward(self, *args, **kwargs)

    state = torch.get_rng_state()
    type(model).forward = failing
    try:
        with suppress(Boom):  # some look at the weights alone
            located(name, model, other, data, batch_size=1)
    finally:
        type(model).forward = forward
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(bits) - 1)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def change(model):
    name = "model.layers.1.mlp.down_proj.weight"
    shape = tuple(model.get_parameter(name).shape)
    values = model.get_parameter(name).detach()[:3] + 0.3
    return Graft.made(model, {name: Slice(Region.of(shape, "rows", [0, 1, 2]), values)})


def measures(name, model, batches):
    found = choose("audits", name).function(model, change(model), batches)["measures"]
    return {key: measure["change"]["value"] for key, measure in found.items()}


@pytest.mark.parametrize("name", AUDITS)
def test_audits_do_not_hang_on_batches_padding_or_order(name):
    model, examples = pico("llama"), rows(4)
    plain = measures(name, model, batched(examples))
    order = [examples[i] for i in (3, 1, 5, 0, 4, 2)]
    for other in (batched(examples, 1), batched(examples, 6), batched(examples, left=3, junk=True), batched(order)):
        assert measures(name, model, other) == pytest.approx(plain, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("name", AUDITS)
def test_an_audit_that_fails_midway_leaves_the_model_as_found(name):
    model, batches = pico("llama"), batched(rows(4))
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    graft, model = change(model), model.train()
    batches[1]["input_ids"][0, 1] = 10**6
    with suppress(IndexError):  # of weights alone some tell
        choose("audits", name).function(model, graft, batches)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
