"""LISA: gamma layers at a time, drawn uniformly; the sleeping ones keep every bit and hold no state."""

import hashlib
import itertools
from contextlib import contextmanager
from functools import wraps

import pytest
import torch

from neurograft.anatomy.depth import depths
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.resolve import resolve
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import fit as plain_fit
from neurograft.worlds.tiny import llama
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import KNOWN, LEARNED, moved, rows_in, snapshot

PAPER, SCALE = "lisa", "identity"


@contextmanager
def layers_are_drawn_every_step():
    """The period is forgotten."""
    sampled = resolve("neurograft.schedules.sampled")

    @wraps(sampled)
    def restless(step, names, **options):
        return sampled(step * options.get("every", 20), names, **options)

    with patched("neurograft.schedules.sampled", "sampled", restless):
        yield


@contextmanager
def sleepers_keep_their_moments():
    """The optimizer's state of a layer that falls asleep stays."""
    phase = resolve("neurograft.core.context.Phase")
    with patched("neurograft.schedules.sampled", "Phase", lambda **said: phase(**{**said, "moments": "keep"})):
        yield


@contextmanager
def the_same_layers_are_drawn_again():
    """The draw does not know which one it is."""
    named = resolve("neurograft.core.seeds.generator")
    with patched("neurograft.schedules.sampled", "generator", lambda seed, *names: named(seed)):
        yield


BROKEN = (layers_are_drawn_every_step, sleepers_keep_their_moments, the_same_layers_are_drawn_again)


def model_of(layers=4):
    return pico("llama", num_hidden_layers=layers)


def drawn(model, step, deep=None, **options):
    names = [n for n, _ in model.named_parameters()]
    awake = resolve("neurograft.schedules.sampled")(step, names, depth=deep or depths(model), **options).awake
    layers = {int(n.split(".")[2]) for n in awake if ".layers." in n}
    assert {n for n in names if ".layers." not in n} <= awake
    assert {n for n in awake if ".layers." in n} == {
        n for n in names if ".layers." in n and int(n.split(".")[2]) in layers
    }
    return layers


def watched(model, *, steps, optimizer=torch.optim.AdamW, **options):
    """Train with sampled layers and return, for each step, the layers that moved and the bytes of state."""
    batches = [pico_batch(model, batch=4, seed=s) for s in range(3)]
    history, state = [snapshot(model)], []

    class Seen(optimizer):
        def step(self, closure=None):
            out = super().step(closure)
            held = {g["name"]: self.state.get(g["params"][0], {}) for g in self.param_groups}
            state.append({n: sum(v.numel() for k, v in s.items() if k != "step") for n, s in held.items()})
            return out

    with attach(model) as live:
        fit(
            live, batches, steps=steps, lr=1e-3, weight_decay=0.1, optimizer=Seen, schedule=("sampled", options),
            evaluate=lambda step: history.append(snapshot(model)),
        )  # fmt: skip
        graft = live.graft()
    return history, state, graft


def of_layer(values, layer):
    digest = hashlib.sha256()
    for name, value in values.items():
        if f".layers.{layer}." in name:
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def test_sleeping_layers_keep_every_bit_and_hold_no_state():
    """4 layers, gamma 2, K 3, 12 steps of AdamW with weight decay."""
    model = model_of()
    before = snapshot(model)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    history, state, graft = watched(model, steps=12, count=2, every=3, seed=1)
    assert not moved(before, model)
    turns = set()
    for step in range(12):
        was, now = history[step], history[step + 1]
        awake = {layer for layer in range(4) if of_layer(was, layer) != of_layer(now, layer)}
        assert awake == drawn(model, step - step % 3, count=2, every=3, seed=1)
        assert len(awake) == 2
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert not torch.equal(was[name], now[name])
        allowed = sum(2 * s for n, s in sizes.items() if ".layers." not in n or int(n.split(".")[2]) in awake)
        assert sum(state[step].values()) == allowed
        turns.add(frozenset(awake))
    assert len(turns) > 1
    assert graft.numel > 0


def test_moments_that_are_kept_stay_until_the_layer_is_awake_again():
    model = model_of()
    _, state, _ = watched(model, steps=9, count=1, every=3, moments="keep", seed=0)
    held = [{int(n.split(".")[2]) for n, size in s.items() if size and ".layers." in n} for s in state]
    slept = [drawn(model, step, count=1, every=3, seed=0) for step in range(0, 9, 3)]
    assert held[-1] == set().union(*slept)
    assert len(held[-1]) > 1


def test_all_layers_awake_is_full_fine_tuning_bit_for_bit():
    model = model_of(3)
    batches = [pico_batch(model, batch=4, seed=s) for s in range(3)]
    grafts = []
    for schedule in (None, ("sampled", {"count": 3, "every": 2})):
        with attach(model) as live:
            fit(live, batches, steps=6, lr=1e-3, weight_decay=0.1, schedule=schedule)
            grafts.append(live.graft())
    assert grafts[0].identity == grafts[1].identity


def test_every_layer_is_drawn_equally_often():
    """Chi-square over 500 draws of 2 of 6 layers; drawing without replacement shrinks it by 1 - 2/6 times 6/5."""
    model = model_of(6)
    deep = depths(model)
    counts = torch.zeros(6)
    pairs = set()
    for turn in range(500):
        layers = drawn(model, turn * 5, deep, count=2, every=5, seed=3)
        counts[list(layers)] += 1
        pairs.add(frozenset(layers))
        assert layers == drawn(model, turn * 5 + 4, deep, count=2, every=5, seed=3)
    expected = 500 * 2 / 6
    statistic = float(((counts - expected).square() / expected).sum()) / ((1 - 2 / 6) * 6 / 5)
    assert statistic < 15.1  # 99 % of chi-square with 5 degrees of freedom
    assert len(pairs) == 15
    assert drawn(model, 0, deep, count=2, seed=3) == drawn(model, 0, deep, count=2, seed=3)
    fixed = {frozenset(drawn(model, step, deep, count=2, every=1, redraw=False)) for step in range(20)}
    assert len(fixed) == 1


def test_what_cannot_be_drawn_is_refused():
    model = model_of(2)
    for bad in ({"count": 3}, {"count": 0}, {"every": 0}):
        with pytest.raises(RequestError, match="1 to 2 layers"), attach(model) as live:
            fit(live, [pico_batch(model)], steps=1, schedule=("sampled", bad))


def test_low_rank_factors_sleep_with_their_layers():
    """The schedule is an axis of its own: layers of LoRA factors."""
    model = model_of()
    with attach(model, adapter="lora") as live:
        history = [live.state_dict()]
        fit(
            live, [pico_batch(model, batch=4)], steps=4, lr=1e-2, evaluate=lambda s: history.append(live.state_dict()),
            schedule=("sampled", {"count": 1, "every": 2, "ends": False}),
        )  # fmt: skip
    for was, now in itertools.pairwise(history):
        assert len({int(n.split(".")[2]) for n in was if not torch.equal(was[n], now[n])}) == 1


def test_the_norms_along_the_depth_by_hand():
    """Layer 1 doubled in the first of two changes, the head moved by a number of norm 3 in the second."""
    model = model_of(2)
    size = {n: float(p.detach().double().norm()) for n, p in model.named_parameters()}

    def of(place):
        return sum(v**2 for n, v in size.items() if place in n) ** 0.5

    grafts = []
    for step in range(2):
        with attach(model) as live:
            with torch.no_grad():
                for name, value in live.trained().items():
                    if step == 0 and ".layers.1." in name:
                        value *= 2
                    elif step == 1 and name == "lm_head.weight":
                        value[0, 0] += 3
            grafts.append(live.graft())
    found = resolve("neurograft.audits.layer_norms")(model, grafts)
    assert [p["name"] for p in found["places"]] == ["embeddings", "layer 0", "layer 1", "behind"]
    low, first, second, head = found["places"]
    assert low["norm_base"] == low["norm"] == pytest.approx(size["model.embed_tokens.weight"])
    assert (low["change"], first["change"]) == (0.0, 0.0)
    assert second["norm"] == pytest.approx(1.5 * of(".layers.1."), rel=1e-6)
    assert second["change"] == pytest.approx(0.5 * of(".layers.1."), rel=1e-6)
    assert head["change"] == pytest.approx(1.5)
    assert found["ends_share"] == pytest.approx(9 / (9 + of(".layers.1.") ** 2), rel=1e-6)
    assert resolve("neurograft.audits.layer_norms")(model, Graft())["ends_share"] == 0.0
    with pytest.raises(RequestError, match="no change"):
        resolve("neurograft.audits.layer_norms")(model, [])


def test_the_recipe_wakes_gamma_layers():
    model = model_of(3)
    rows = rows_in(pico_batch(model, batch=4))
    before = snapshot(model)
    out = run("lisa", model, rows, changes={"gamma": 1, "K": 99, "lr": 1e-2, "batch": 2, "warmup": 0.0}, seed=4)
    assert not moved(before, model)
    out.graft.apply(model)
    layers = {int(n.split(".")[2]) for n in moved(before, model) if ".layers." in n}
    assert layers == drawn(model, 0, count=1, seed=4)


def old(seed):
    return mixture(KNOWN, count=200, batch=32, length=3, seed=seed)


def loss_after(model, where, *, seed, **options):
    train = mixture((LEARNED,), count=40, batch=32, length=3, seed=50 + seed)
    test = mixture((LEARNED,), count=1, batch=256, length=3, seed=90)[0]
    with attach(model, where, **options.pop("adapter", {})) as live:
        fit(live, train, steps=120, warmup=10, decay="linear", seed=seed, **options)
        model.eval()
        with torch.no_grad():
            return float(model(**test).loss)


@effect
def test_sampled_layers_learn():
    """A decoder of 4 layers that copies and reverses learns to count: final loss, equal steps, 3 seeds.

    The card asks that sampled layers beat a fixed random one. They do not here, which is why the scale says
    "identity": with embeddings and head awake, one layer trained all the time suffices for so small a task, and each
    of four sampled ones gets a quarter of the steps. In a partial search on one seed "sort" gave the same order at
    rates 1e-3 and 4e-3, periods 5 and 20, moments kept or dropped; "count" at 1e-3 favoured sampling at a period of 5
    and not at 20. That sampled layers learn is asserted.
    """
    table = {"before": [], "lisa": [], "fixed": [], "lora_r8": [], "full": []}
    for seed in range(3):
        model = plain_fit(llama(seed, hidden_size=48, intermediate_size=96, num_key_value_heads=4), old(seed), lr=3e-3)
        test = mixture((LEARNED,), count=1, batch=256, length=3, seed=90)[0]
        with torch.no_grad():
            table["before"].append(float(model(**test).loss))
        one = {"count": 1, "every": 10}
        table["lisa"].append(loss_after(model, None, seed=seed, lr=2e-3, schedule=("sampled", one)))
        fixed = ("sampled", {**one, "redraw": False})
        table["fixed"].append(loss_after(model, None, seed=seed, lr=2e-3, schedule=fixed))
        table["full"].append(loss_after(model, None, seed=seed, lr=2e-3))
        low = {"adapter": "lora", "r": 8}
        table["lora_r8"].append(loss_after(model, None, seed=seed, lr=1e-2, adapter=low))
    note(**table)
    gains = [fixed - ours for fixed, ours in zip(table["fixed"], table["lisa"])]
    bar("loss of a fixed random layer less that of sampled layers", gains, at_least=0.0, missed=True)
    assert max(table["lisa"]) < 0.8 * min(table["before"])
