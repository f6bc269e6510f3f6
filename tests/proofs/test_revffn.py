"""RevFFN: gradients of the stored version without its activations, and inverses that are checked, not believed."""

import copy
import tempfile
from contextlib import contextmanager, nullcontext

import pytest
import torch

from neurograft.core.compact.meter import Peak, saved
from neurograft.core.errors import RequestError, RunError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.graft import Graft
from neurograft.networks._coupling import Block, in_two
from neurograft.networks._reversing import Wrapped
from neurograft.networks._routing import Routing
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import llama
from tests.proofs import bar, note, patched
from tests.proofs._tools import moved, rows_in, snapshot

PAPER, SCALE = "revffn", "tiny"


@contextmanager
def only_the_residual_is_looked_at():
    """An input counts as recovered if its output is the right one: another input may have the same output."""

    def residual(self, x, y, kwargs):
        again = self.forward(*self.inverse(*y, kwargs), kwargs)
        return max(float((a - b).abs().max()) for a, b in zip(again, y)) > self.tape.tolerance

    with patched(Block, "misses", residual):
        yield


@contextmanager
def experts_are_chosen_anew():
    """The backward pass lets routers choose by the recovered numbers."""
    with patched(Routing, "replayed", lambda self, chosen: nullcontext()):
        yield


@contextmanager
def every_layer_keeps_its_output():
    """Each block saves what only the top one should."""
    made = Block.__post_init__

    def keeping(self):
        made(self)
        self.last = True

    with patched(Block, "__post_init__", keeping):
        yield


BROKEN = (only_the_residual_is_looked_at, experts_are_chosen_anew, every_layer_keeps_its_output)


class Stored(Wrapped):
    """The literal twin: the same block, differentiated by autograd, which stores everything."""

    def __call__(self, hidden_states, *args, **kwargs):
        block, given = self.block, self.block.arguments(args, kwargs)
        given |= {k: v for k, v in (("past_key_values", None), ("use_cache", False)) if k in given}
        block.drawn()
        return block.out(block.forward(*in_two(hidden_states), given))


@contextmanager
def storing(live):
    """Run a mount's blocks as their twins."""
    for layer, wrapped in live.reversing.wrapped:
        layer.forward = Stored(wrapped.block)
    yield
    live.reversing.put()


def gradients(live, batch):
    for parameter in live.parameters():
        parameter.grad = None
    loss = live.model(**batch).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in live.named_parameters().items() if p.grad is not None}


def exact(family, **config):
    model = pico(family, dtype=torch.float64, **config)
    if getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")  # the fused kernel has no float64
    return model


def test_gradients_are_those_of_the_stored_version():
    for family, form in (("llama", "standard"), ("llama", "coupled"), ("mixtral", "standard"), ("olmoe", "coupled")):
        model = exact(family)
        batch, before = pico_batch(model), snapshot(model)
        with attach(model, adapter=("reversible", {"form": form})) as live:
            loss, ours = gradients(live, batch)
            with storing(live):
                same, theirs = gradients(live, batch)
        assert loss == same
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-8)
        assert not moved(before, model)


def test_the_routers_own_loss_reaches_what_it_reached_and_is_recorded_once():
    """A balance loss reads the routers' logits, of each layer one, also where the inverse is checked."""
    for family, form in (("mixtral", "coupled"), ("olmoe", "standard")):
        model = exact(family)
        model.config.output_router_logits, model.router_aux_loss_coef = True, 5.0
        batch = pico_batch(model)
        with attach(model, adapter=("reversible", {"form": form})) as live:
            assert len(model(**batch).router_logits) == model.config.num_hidden_layers
            loss, ours = gradients(live, batch)
            with storing(live):
                same, theirs = gradients(live, batch)
        assert loss == same
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-8)


def test_a_layer_of_which_only_a_part_is_awake_gets_its_gradient():
    """Nothing below asks for a gradient, and the projections sleep."""
    model = exact("llama")
    batch = pico_batch(model)
    with attach(model, adapter="reversible") as live:
        _, whole = gradients(live, batch)
        name = "model.layers.1.mlp.down_proj.weight"
        for other, parameter in live.named_parameters().items():
            parameter.requires_grad_(other == name)
        _, ours = gradients(live, batch)
        assert ours.keys() == {name}
        torch.testing.assert_close(ours[name], whole[name], rtol=0, atol=1e-12)
        (asked,) = torch.autograd.grad(model(**batch).loss, live.named_parameters()[name])
        torch.testing.assert_close(asked, whole[name], rtol=0, atol=1e-12)


def test_dropout_is_drawn_again_and_autocast_entered_again():
    model = exact("llama", attention_dropout=0.4).train()
    batch = pico_batch(model)
    with attach(model, adapter="reversible") as live, torch.random.fork_rng(devices=[]):
        found = []
        for twin in (nullcontext(), storing(live)):
            torch.manual_seed(0)
            with twin:
                found.append(gradients(live, batch))
        assert found[0][0] == found[1][0]
        for name, gradient in found[1][1].items():
            torch.testing.assert_close(found[0][1][name], gradient, rtol=0, atol=1e-10)
    model = pico("llama")
    batch = pico_batch(model)
    with attach(model, adapter="reversible") as live:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss, ours = gradients(live, batch)
            with storing(live):
                same, theirs = gradients(live, batch)
        assert loss == same
        for name, gradient in theirs.items():
            assert float((ours[name] - gradient).norm()) <= 0.02 * float(gradient.norm()), name


def blocks(seed, *, scale, form, **options):
    """Return the mount of a one-layer decoder with wide weights and its branch scaled, and a batch."""
    model = llama(seed, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4).double()
    live = attach(model, adapter=("reversible", {"form": form, **options}))
    for half in live.halves:
        if half.name.endswith("half_down"):
            half.theta.data.mul_(scale)
    return live, mixture(("copy",), count=1, batch=2, length=3, seed=seed)[0]


def inputs(live, batch):
    """Return the block, its input, its output and what its attention is told, in one forward pass."""
    ((layer, wrapped),) = live.reversing.wrapped
    seen = []

    def watch(hidden, *args, **kwargs):
        seen.append((in_two(hidden), wrapped.block.arguments(args, kwargs)))
        return wrapped(hidden, *args, **kwargs)

    layer.forward = watch
    with torch.no_grad():
        live.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
        layer.forward = wrapped
        x, told = seen[0]
        return wrapped.block, x, wrapped.block.forward(*x, told), told


def off(found, x):
    return max(float((a - b).abs().max()) for a, b in zip(found, x))


def test_the_standard_form_inverts_at_once_at_any_scale():
    for scale in (0.3, 2.0, 10.0):
        live, batch = blocks(0, scale=scale, form="standard")
        with live, torch.no_grad():
            block, x, y, told = inputs(live, batch)
            assert off(block.inverse(*y, told), x) < 1e-12


def test_the_coupled_form_converges_where_it_contracts():
    """More iterations, less error; the second half is exact at once."""
    live, batch = blocks(0, scale=0.5, form="coupled")
    with live, torch.no_grad():
        block, x, y, told = inputs(live, batch)
        errors = []
        for iterations in (1, 3, 6, 20, 100):
            block.tape.iterations = iterations
            found = block.inverse(*y, told)
            errors.append(off(found[:1], x[:1]))
            assert off(found[1:], x[1:]) < 1e-14
    note(errors_after_1_3_6_20_100=errors)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_what_cannot_be_recovered_is_stored_and_the_gradients_stay_right():
    """12 random blocks at scale 2, where the fixed point cycles or finds another input; 4 at 0.3, most recovered."""
    missed, kept = 0, 0
    for seed, scale in [*((s, 2.0) for s in range(12)), *((s, 0.3) for s in range(4))]:
        live, batch = blocks(seed, scale=scale, form="coupled", iterations=60)
        with live:
            with torch.no_grad():
                block, x, y, told = inputs(live, batch)
                bad = off(block.inverse(*y, told), x) > 1e-9 * (1 + max(float(h.abs().max()) for h in x))
            live.tape.stored = 0
            _, ours = gradients(live, batch)
            assert live.tape.stored == int(bad), seed
            missed, kept = missed + bad, kept + live.tape.stored
            with storing(live):
                _, theirs = gradients(live, batch)
            for name, gradient in theirs.items():
                torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-8)
    note(blocks_not_recovered=missed)
    assert 12 <= missed == kept < 16


def test_a_small_residual_does_not_prove_that_the_input_was_found():
    """F(x) = |x| - x: X1 = -1 gives Y1 = 1, the iteration from X1 = Y1 stays at 1, whose output is 1 as well."""
    live, batch = blocks(0, scale=1.0, form="coupled")
    with live, torch.no_grad():
        block, x, _, told = inputs(live, batch)
        with patched(block, "first", lambda x1, x2, kwargs: x1.abs() - x1), patched(block, "second", lambda y1: 0 * y1):
            mine = (-torch.ones_like(x[0]), x[1])
            y = block.forward(*mine, told)
            found = block.inverse(*y, told)
            assert off(block.forward(*found, told), y) == 0.0
            assert off(found, mine) == 2.0
            assert block.misses(mine, y, told)


def kept(layers, *, adapter, family="llama"):
    """Return the bytes saved for the backward pass, and the most alive during a step, by number of layers."""
    model = pico(family, num_hidden_layers=layers)
    batch = pico_batch(model, batch=8)
    with attach(model, adapter=adapter) as live:
        with saved(model) as meter:
            model(**batch, use_cache=False)
            held = meter.bytes
        with Peak() as peak:
            model(**batch, use_cache=False).loss.backward()
        grads = sum(p.grad.numel() * p.grad.element_size() for p in live.parameters() if p.grad is not None)
    return held, peak.peak - grads


def test_activation_memory_is_flat_in_depth():
    """Bytes for 2, 4 and 8 layers, dense and experts: saved for backward, and the most alive less the gradients."""
    for family in ("llama", "mixtral"):
        ours, plain = ([kept(n, adapter=a, family=family) for n in (2, 4, 8)] for a in ("reversible", "dense"))
        note(**{f"{family}_saved": [float(s) for s, _ in ours], f"{family}_plain": [float(s) for s, _ in plain]})
        bar(f"{family}: saved bytes at 8 layers over 2 layers", ours[2][0] / ours[0][0], at_most=1.0)
        assert plain[2][0] - plain[1][0] > 1.8 * (plain[1][0] - plain[0][0]) > 0
        assert ours[2][1] - ours[0][1] < 0.15 * (plain[2][1] - plain[0][1])


def test_experts_are_chosen_as_they_were():
    """Two experts a rounding apart: with the choice replayed, the scores are recomputed for the same two."""
    model = pico("mixtral")
    feed = model.model.layers[0].mlp
    routing, (router,) = Routing.of(feed), Routing.of(feed).routers
    x = torch.randn(6, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), routing.noted() as chosen:
        _, scores, indices = router(x)
    with torch.no_grad():
        with routing.replayed(chosen):
            again = router(x)
            _, other, same = router(-x)
        assert torch.equal(again[1], scores)
        assert torch.equal(same, indices)
        wanted = router(-x)[0].softmax(-1).gather(-1, indices)
        torch.testing.assert_close(other, wanted / wanted.sum(-1, keepdim=True))
        assert not torch.equal(router(-x)[2], indices)


def test_the_recipe_moves_projections_first_then_everything_and_ships_the_network():
    model = pico("llama")
    batch = pico_batch(model, batch=8)
    rows = rows_in(batch)
    before, plain = snapshot(model), model(**batch).logits
    only = run("revffn", model, rows, changes={"lr": 1e-3, "epochs": 1, "batch": 4, "warmup": 10}).graft
    assert not only.deltas
    graft = run("revffn", model, rows, changes={"lr": 1e-3, "epochs": 2, "batch": 4, "warmup": 1}).graft
    assert graft.deltas.keys() == before.keys()
    assert graft.card["reversible"] == {"form": "standard", "passes": 4, "stored": 0}
    with tempfile.TemporaryDirectory() as folder:
        read = Graft.load(graft.save(folder))
    assert read.identity == graft.identity
    with torch.no_grad():
        with read.on(model):
            assert not same_bits(model(**batch).logits, plain)
            start, greedy = batch["input_ids"][:1, :4], {"max_new_tokens": 5, "do_sample": False}
            said = [model.generate(start, use_cache=cached, **greedy) for cached in (True, False)]
            assert torch.equal(*said)
        assert same_bits(model(**batch).logits, plain.detach())
    assert not moved(before, model)
    with pytest.raises(RequestError, match="strength"):
        graft.scale(0.5)


def test_it_learns_in_bfloat16_with_dropout_and_ends_as_it_last_was():
    model = pico("llama", dtype=torch.bfloat16, attention_dropout=0.1)
    batch = pico_batch(model, batch=8)
    with attach(model, adapter="reversible") as live:
        losses = fit(live, [batch], steps=30, lr=3e-3)
        model.eval()
        with torch.no_grad():
            last = model(**batch).logits.clone()
        graft = live.graft()
    assert losses[-1] < losses[0] - 0.3
    with graft.on(model), torch.no_grad():
        assert same_bits(model(**batch).logits, last)


def test_what_it_cannot_do_is_refused():
    model = pico("llama")
    with attach(model, adapter="reversible"), pytest.raises(RunError, match="copy"):
        copy.deepcopy(model)
    with pytest.raises(RequestError, match="decoder"):
        attach(pico("bert"), adapter="reversible")
    with pytest.raises(RequestError, match="one matrix"):
        attach(pico("phi3"), adapter=("reversible", {"form": "coupled"}))
    with pytest.raises(RequestError, match="form"):
        attach(model, adapter=("reversible", {"form": "other"}))
    assert "forward" not in vars(model.model.layers[0])
