"""Taps: hand-indexed activations, padding, caches, experts, recomputation, silence, and leaving no trace."""

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.context import token_mask
from neurograft.core.errors import RequestError, RunError
from neurograft.core.taps.board import ATTRIBUTE, put, take
from neurograft.core.taps.tap import change, gradients, watch
from neurograft.core.units import Site, Tap
from neurograft.worlds.pico import pico, pico_batch


def neurons(layers=2, n=48, side="input", module="model.layers.{}.mlp.down_proj"):
    return {f"n{i}": Site(f"n{i}", "neuron", n, tap=Tap(module.format(i), side), layer=i) for i in range(layers)}


def heads(model, layers=2):
    return {
        f"h{i}": Site(
            f"h{i}", "head", 4, tap=Tap(f"model.layers.{i}.self_attn.o_proj", "input", width=8, stride=8), layer=i
        )
        for i in range(layers)
    }


def experts(layer=0):
    module = f"model.layers.{layer}.mlp.experts"
    return {f"e{i}": Site(f"e{i}", "neuron", 48, tap=Tap(module, "input", expert=i), layer=layer) for i in range(4)}


def trace(model):
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__, ATTRIBUTE in m.__dict__)
        for m in model.modules()
    ]


def test_reader_gets_the_real_tokens_of_each_tap():
    model = pico("llama")
    batch, seen, direct = pico_batch(model), {}, {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: direct.__setitem__(f"n{i}", a[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    before = trace(model)
    with watch(model, neurons() | heads(model), lambda n, x: seen.__setitem__(n, x)) as found:
        model(**batch)
    assert trace(model) == before
    for hook in hooks:
        hook.remove()
    kept = batch["attention_mask"].bool()
    for name, x in direct.items():
        assert torch.equal(seen[name], x[kept])
    assert seen["h0"].shape == (14, 4, 8)
    assert found.tokens["n0"] == 14
    assert found.fired["n1"] == 1


@pytest.mark.parametrize("positions", ["all", "last", "answer", "prompt"])
def test_position_selectors_are_those_of_the_context(positions):
    model = pico("llama")
    batch, places = pico_batch(model, length=6), []
    batch["labels"][:, :3] = -100
    with watch(model, neurons(1), lambda n, x: places.append((x, *found.place())), mask=positions) as found:
        model(**batch)
    (x, rows, at) = places[0]
    expected = token_mask(batch, positions).nonzero()
    assert torch.stack([rows, at], 1).tolist() == expected.tolist()
    assert len(x) == len(expected)


def test_positions_go_on_through_a_cache_and_left_padding_is_left_out():
    model = pico("llama")
    tokens = torch.randint(3, 64, (2, 5))
    attention = torch.ones_like(tokens)
    attention[1, :2] = 0
    at = []
    with watch(model, neurons(1), lambda n, x: at.append(found.place()[1].tolist())) as found:
        model.generate(input_ids=tokens, attention_mask=attention, max_new_tokens=3, do_sample=False)
    assert at[0] == [0, 1, 2, 3, 4, 2, 3, 4]
    assert at[1:] == [[5, 5], [6, 6]]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts_see_exactly_the_tokens_routed_to_them(implementation):
    model = pico("mixtral")
    model.config._experts_implementation = implementation
    batch, seen, routed = pico_batch(model), {}, {}
    experts_module = model.model.layers[0].mlp.experts
    hook = experts_module.register_forward_pre_hook(lambda m, a: routed.update(x=a[0], index=a[1]))
    before = trace(model)
    with watch(model, experts(), lambda n, x: seen.__setitem__(n, (x, *found.place()))) as found:
        model(**batch)
    assert trace(model) == before
    assert model.config._experts_implementation == implementation
    hook.remove()
    real = batch["attention_mask"].bool().reshape(-1)
    for e in range(4):
        tokens = [t for k in range(2) for t in range(16) if routed["index"][t, k] == e and real[t]]
        gate, up = (routed["x"][tokens] @ experts_module.gate_up_proj[e].T).chunk(2, -1)
        x, rows, at = seen[f"e{e}"]
        assert torch.allclose(x, nn.functional.silu(gate) * up, atol=1e-6)
        assert (rows * 8 + at).tolist() == tokens
    assert sum(found.tokens.values()) == 2 * int(real.sum())


def test_change_of_an_expert_equals_the_change_of_its_weights():
    model = pico("mixtral")
    batch, site = pico_batch(model), {"e2": experts()["e2"]}
    off = torch.zeros(48).index_fill(0, torch.tensor([3, 7]), 1.0)
    with change(model, site, lambda n, x: x * (1 - off)):
        hooked = model(**batch).logits
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2][:, [3, 7]] = 0
        assert torch.allclose(hooked, model(**batch).logits, atol=1e-6)


def test_change_equals_hand_work_and_leaves_no_trace():
    model = pico("llama")
    batch, before = pico_batch(model), trace(pico("llama"))
    plain = model(**batch).logits
    off = torch.ones(48)
    off[5] = 0
    with change(model, neurons(1), lambda n, x: x * off):
        changed = model(**batch).logits
    assert trace(model) == before
    assert torch.equal(model(**batch).logits, plain)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5] = 0
    assert torch.allclose(model(**batch).logits, changed, atol=1e-6)
    assert not torch.allclose(changed, plain, atol=1e-4)


def test_gradients_are_those_of_autograd_and_touch_no_parameter():
    model = pico("llama")
    batch = pico_batch(model)
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.grad = kept = torch.ones_like(model.lm_head.weight)
    flags = [p.requires_grad for p in model.parameters()]
    held = []

    def keep(module, args):
        args[0].retain_grad()
        held.append(args[0])

    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(keep)
    model(**batch).loss.backward()
    hook.remove()
    for p in model.parameters():
        p.grad = None
    model.lm_head.weight.grad = kept
    found = {}
    with gradients(model, neurons(), lambda n, x, g, rows: found.__setitem__(n, (x, g, rows))):
        model(**batch).loss.backward()
    real = batch["attention_mask"].bool().reshape(-1, 1)
    x, g, rows = found["n1"]
    assert torch.allclose(g, held[0].grad.reshape(16, 48) * real, atol=1e-8)
    assert torch.equal(x, held[0].detach().reshape(16, 48))
    assert rows.tolist() == [0] * 8 + [1] * 8
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.lm_head.weight.grad is kept
    assert all(p.grad is None for p in model.model.parameters())


def test_gradients_outside_of_the_mask_are_zero():
    model = pico("llama")
    batch, found = pico_batch(model), {}
    for positions in ("all", "last"):
        with gradients(model, neurons(1), lambda n, x, g, rows: found.__setitem__(positions, g), mask=positions):  # noqa: B023
            model(**batch).logits.sum().backward()
    kept = token_mask(batch, "last").reshape(-1)
    assert torch.equal(found["last"][kept], found["all"][kept])
    assert found["last"][~kept].abs().sum() == 0
    assert found["all"][~kept].abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_neither_counted_twice_nor_lost(reentrant):
    model = pico("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    batch, calls = pico_batch(model), []
    with watch(model, neurons(), lambda n, x: calls.append(n)):
        model(**batch).loss.backward()
    assert sorted(calls) == ["n0", "n1"]
    found = {}
    with gradients(model, neurons(), lambda n, x, g, rows: found.__setitem__(n, g)):
        model.enable_input_require_grads()
        model(**batch).loss.backward()
    model.disable_input_require_grads()
    model.activation_checkpointing_disable()
    plain = {}
    with gradients(model, neurons(), lambda n, x, g, rows: plain.__setitem__(n, g)):
        model(**batch).loss.backward()
    assert all(torch.allclose(found[n], plain[n], atol=1e-8) for n in plain)


def test_a_change_reaches_the_recomputation():
    model = pico("llama").train()
    batch, grads = pico_batch(model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with change(model, neurons(), lambda n, x: x * 2):
            model(**batch).loss.backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
        model.zero_grad()
    assert torch.allclose(*grads, atol=1e-7)


def test_silence_is_an_error():
    model = pico("llama")
    batch = pico_batch(model)
    with pytest.raises(RunError, match="never fired"), watch(model, neurons(), lambda n, x: None):
        pass
    with pytest.raises(RunError, match="no backward pass"), gradients(model, neurons(), lambda *a: None):
        model(**batch)
    with (
        pytest.raises(RunError, match="no token"),
        watch(model, neurons(), lambda n, x: None, mask=lambda b: torch.zeros(2, 8)),
    ):
        model(**batch)
    with pytest.raises(RequestError, match="did you mean"):
        with watch(model, neurons(module="model.layers.{}.mlp.down_prjo"), lambda n, x: None):
            model(**batch)
    with pytest.raises(RequestError, match="no activations to tap"):
        with watch(model, {"w": Site("w", "weight", 3)}, lambda n, x: None):
            model(**batch)
    assert trace(model) == trace(pico("llama"))


def test_an_error_inside_the_block_is_the_one_that_comes_out():
    model = pico("llama")
    with pytest.raises(ZeroDivisionError), watch(model, neurons(), lambda n, x: None):
        raise ZeroDivisionError
    assert trace(model) == trace(pico("llama"))


def test_a_model_may_change_a_tapped_activation_in_place():
    class Rude(nn.Module):
        def forward(self, x):
            return x.mul_(3.0) * 1.0

    net, found = nn.Sequential(nn.Linear(2, 3), nn.Identity(), Rude()), {}
    plain = net[0](torch.ones(2, 2)).detach()
    with gradients(net, {"a": Site("a", "neuron", 3, tap=Tap("1"))}, lambda n, x, g, rows: found.update(x=x, g=g)):
        net(torch.ones(2, 2)).sum().backward()
    assert torch.equal(found["x"], plain)
    assert found["g"].tolist() == [[3.0] * 3] * 2


def test_tuple_and_mapping_outputs_and_keyword_inputs():
    class Two(nn.Module):
        def forward(self, x, other=None):
            return x, other * 2

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            return self.two(x, other=x)[1]

    net, x = Root(), torch.ones(2, 3)
    out = {"o": Site("o", "channel", 3, tap=Tap("two", "output", index=1))}
    into = {"i": Site("i", "channel", 3, tap=Tap("two", "input", index=1))}
    with change(net, out, lambda n, v: v + 1):
        assert net(x).tolist() == [[3.0] * 3] * 2
    with change(net, into, lambda n, v: v + 1):
        assert net(x).tolist() == [[4.0] * 3] * 2


def test_convolution_maps_and_strided_units():
    x = torch.arange(2 * 6 * 4.0).reshape(2, 6, 2, 2)
    tap = Tap("c", dim=1, start=1, width=1, stride=2)
    units = take(x, tap, 2)
    assert torch.equal(units, torch.stack([x[:, 1], x[:, 3]], -1))
    back = put(x, tap, 2, units * 0)
    assert back[:, [1, 3]].abs().sum() == 0
    assert torch.equal(back[:, [0, 2, 4, 5]], x[:, [0, 2, 4, 5]])


def test_changes_of_one_tap_compose_in_the_order_of_their_keys():
    model = pico("llama")
    batch, outs = pico_batch(model), []
    double, plus = (lambda n, x: x * 2), (lambda n, x: x + 1)
    for first, second in (((double, "a"), (plus, "b")), ((plus, "b"), (double, "a"))):
        with change(model, neurons(), first[0], key=first[1]), change(model, neurons(), second[0], key=second[1]):
            outs.append(model(**batch).logits)
    assert torch.equal(*outs)


def test_reader_inside_a_change_sees_what_the_model_goes_on_with():
    model = pico("llama")
    batch, seen = pico_batch(model), []
    with watch(model, neurons(1), lambda n, x: seen.append(x)), change(model, neurons(1), lambda n, x: x * 0):
        model(**batch)
    assert seen[0].abs().sum() == 0


@pytest.mark.parametrize("length", [8, 6])
def test_labels_of_an_encoder_decoder_are_its_decoders(length):
    """Also where inputs and answers happen to be of one length."""
    model = pico("t5")
    batch = pico_batch(model, batch=2, length=8)
    batch["labels"] = batch["labels"][:, :length].clone()
    batch["labels"][1, 4:] = -100
    sides = {side: {n: s for n, s in sites(model, "neuron").items() if n.startswith(side)} for side in ("en", "de")}
    seen = []
    with watch(model, sides["de"], lambda name, x: seen.append(len(x)), mask="answer"):
        model(**batch)
    assert seen == [length + 4] * len(sides["de"])
    with pytest.raises(RequestError, match="without token labels"), watch(model, sides["en"], print, mask="answer"):
        model(**batch)
