"""Half fine-tuning: counts by category, exactly half, the frozen half keeps every bit, half-reset is exact."""

from contextlib import contextmanager
from fractions import Fraction
from functools import wraps

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.pipeline.attach import attach
from neurograft.pipeline.continual import continual
from neurograft.pipeline.put_back import put_back
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.mixture import exact, mixture
from neurograft.worlds.pico import pico, pico_batch
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import base as knowing
from tests.proofs._tools import moved, rows_in, snapshot

PAPER, SCALE = "hft", "tiny"
ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@contextmanager
def modules_are_drawn_without_regard_to_category():
    """Half of all modules."""
    halves = resolve("neurograft.locators.halves")

    @wraps(halves)
    def careless(context, **options):
        return halves(context, **{**options, "granularity": "model", "pairs": False})

    with patched("neurograft.locators.halves", "halves", careless):
        yield


@contextmanager
def every_round_draws_the_same():
    """The round is forgotten."""
    draw = resolve("neurograft.locators.halves._Draw")
    with patched("neurograft.locators.halves", "_Draw", lambda context, number: draw(context, 0)):
        yield


@contextmanager
def the_reset_keeps_everything():
    """Nothing is put back."""
    used = resolve("neurograft.pipeline.attach")

    def unprotected(model, where, *, protect, **options):
        return used(model, where, **options)

    with patched("neurograft.pipeline.put_back", "attach", unprotected):
        yield


BROKEN = (modules_are_drawn_without_regard_to_category, every_round_draws_the_same, the_reset_keeps_everything)


def equal(layers=4, **config):
    """Return a decoder whose queries, keys, values and outputs have one size."""
    return pico("llama", num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, **config)


def draw(model, seed=0, **options):
    scores = resolve("neurograft.locators.halves")(Context(model, sites(model, "module"), seed=seed), **options)
    chosen = {n.partition("/")[0] for n, v in scores.values.items() if float(v[0]) > 0.5}
    return chosen, scores.card


def counts(chosen, layer, among):
    return sum(n.startswith(f"model.layers.{layer}.") and n.rpartition(".")[2] in among for n in chosen)


def test_counts_of_each_category():
    """Of an odd number of layers, one more has the smaller part of its FFN."""
    for layers, seed in ((4, 0), (4, 1), (4, 2), (5, 0), (5, 1), (5, 2)):
        chosen, _ = draw(equal(layers), seed)
        assert [counts(chosen, i, ATTENTION) for i in range(layers)] == [2] * layers
        ffn = [counts(chosen, i, FFN) for i in range(layers)]
        assert sorted(ffn) == [1] * (layers - layers // 2) + [2] * (layers // 2)
        norms = ("input_layernorm", "post_attention_layernorm")
        assert [counts(chosen, i, norms) for i in range(layers)] == [1] * layers
        assert {"model.embed_tokens", "model.norm", "lm_head"} <= chosen


def test_exactly_half_where_shapes_are_equal():
    model = equal()
    chosen, card = draw(model)
    inside = {n: p.numel() for n, p in model.named_parameters() if ".layers." in n}
    trained = sum(size for n, size in inside.items() if n.rpartition(".")[0] in chosen)
    assert Fraction(trained, sum(inside.values())) == Fraction(1, 2)
    assert card["share"] == 0.5


def test_pairs_are_half_under_grouped_queries():
    """8 of 32 heads hold keys and values: q and o have 4 times the entries of k and v, so {k, v} is a fifth."""
    model = pico("llama", hidden_size=64, num_attention_heads=32, num_key_value_heads=8, head_dim=2)
    size = {n: model.get_parameter(f"model.layers.0.self_attn.{n}.weight").numel() for n in ATTENTION}
    assert size["q_proj"] == size["o_proj"] == 4 * size["k_proj"] == 4 * size["v_proj"]

    def shares(pairs):
        for seed in range(12):
            chosen, _ = draw(model, seed, pairs=pairs)
            for layer in range(2):
                mine = [n for n in ATTENTION if f"model.layers.{layer}.self_attn.{n}" in chosen]
                yield Fraction(sum(size[n] for n in mine), sum(size.values()))

    assert set(shares(True)) == {Fraction(1, 2)}
    plain = set(shares(False))
    assert min(plain) == Fraction(1, 5)
    assert max(plain) == Fraction(4, 5)
    with pytest.raises(RequestError, match="pairs among"):
        draw(pico("phi3"), pairs=True)


def test_rounds_and_seeds_name_the_draw():
    model = equal()
    assert draw(model, 1, round=2) == draw(model, 1, round=2)
    assert draw(model, 1, round=2)[0] != draw(model, 1, round=3)[0]
    assert draw(model, 1)[0] != draw(model, 2)[0]


def test_layer_and_model_level():
    model = equal()
    chosen, _ = draw(model, granularity="layer")
    by_layer = {i: {n for n in chosen if n.startswith(f"model.layers.{i}.")} for i in range(4)}
    assert sorted(len(v) for v in by_layer.values()) == [0, 0, 9, 9]
    chosen, _ = draw(model, granularity="model")
    assert sum(".layers." in n for n in chosen) == 4 * 9 // 2


def test_a_family_with_fused_projections_is_halved_as_it_is():
    chosen, _ = draw(pico("phi3"))
    for layer in range(2):
        assert counts(chosen, layer, ("qkv_proj", "o_proj")) == 1
        assert counts(chosen, layer, ("gate_up_proj", "down_proj")) == 1


def test_the_recipe_moves_one_half_and_the_ends():
    model = equal()
    rows = rows_in(pico_batch(model, batch=4))
    before = snapshot(model)
    changes = {"lr": 1e-2, "batch": 2, "warmup": 0.0, "decay": 0.1, "round": 1, "epochs": 2}
    out = run("hft", model, rows, changes=changes, seed=3)
    assert not moved(before, model)
    chosen, _ = draw(model, 3, round=1)
    out.graft.apply(model)
    assert {n.rpartition(".")[0] for n in moved(before, model)} == chosen


def test_half_reset_is_exact():
    model = equal()
    batches = [pico_batch(model, batch=4)]
    before = snapshot(model)
    with attach(model) as live:
        fit(live, batches, steps=3, lr=1e-2)
        graft = live.graft()
    with graft.on(model):
        tuned = snapshot(model)
    scores = resolve("neurograft.locators.halves")(Context(model, sites(model, "module")))
    where = resolve("neurograft.selectors.threshold")(scores, below=0.5)
    half = put_back(model, graft, where)
    assert not moved(before, model)
    reset = {n.partition("/")[0] for n, ids in where.ids.items() if len(ids)}
    with half.on(model):
        for name, parameter in model.named_parameters():
            expected = before if name.rpartition(".")[0] in reset else tuned
            assert torch.equal(parameter, expected[name]), name
    with pytest.raises(RequestError, match="nothing is left"):
        put_back(model, half, ~where)


TASKS = ("sort", "shift", "count")


def learner(choice, seed, model):
    def learn(net, data, name):
        where = None
        if choice != "full":
            options = {"granularity": choice, "round": TASKS.index(name)}
            where = resolve("neurograft.locators.halves")(Context(net, sites(net, "module"), seed=seed), **options)
            where = resolve("neurograft.selectors.threshold")(where, above=0.5)
        with attach(net, where, adapter="dense") as live:
            fit(live, data, steps=80, lr=3e-3, warmup=10, decay="linear", seed=seed)
            return live.graft()

    return learn


@effect
def test_half_forgets_less():
    """Three tasks after another on a decoder that copies and reverses, 3 seeds: backward transfer and what is kept."""
    table = {f"{c}_{what}": [] for c in ("full", "category", "layer", "model") for what in ("bwt", "last", "average")}
    for seed in range(3):
        model = knowing(seed)
        tasks = {
            name: (
                mixture((name,), count=40, batch=32, length=3, seed=50 + seed),
                mixture((name,), count=1, batch=256, length=3, seed=90),
            )
            for name in TASKS
        }
        for choice in ("full", "category", "layer", "model"):
            found = continual(model, tasks, learn=learner(choice, seed, model), score=lambda m, b: exact(m.eval(), b))
            table[f"{choice}_bwt"].append(found.backward_transfer)
            table[f"{choice}_last"].append(float(found.matrix[-1, -1]))
            table[f"{choice}_average"].append(found.average)
    note(**table)
    gains = [half - full for half, full in zip(table["category_bwt"], table["full_bwt"])]
    lost = [full - half for half, full in zip(table["category_last"], table["full_last"])]
    bar("backward transfer of HFT less that of full fine-tuning", gains, at_least=0.0)
    bar("accuracy on the last task lost by HFT", lost, at_most=0.05)
