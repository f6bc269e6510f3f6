"""S2FT: gathered columns train like permuted dense slices; planted channels are found; disjoint grafts add up."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.resolve import resolve
from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site
from neurograft.locators.gradient import gradient
from neurograft.pipeline.attach import attach
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.planted_delta import planted_delta
from neurograft.worlds.tiny import llama
from tests.proofs import bar, effect, note, patched
from tests.proofs._selective import rows_of
from tests.proofs._tools import base, held_out_at, moved, saving, snapshot

PAPER, SCALE = "s2ft", "identity"


@contextmanager
def rows_are_trained_and_not_columns():
    """Of each channel the row of `gate` is taken for its column of `down`."""
    only = resolve("neurograft.selectors.only")

    def first_part(scores, **options):
        return only(scores, **{**options, "parts": [0]})

    first_part.card = only.card
    with patched("neurograft.selectors.only", "only", first_part):
        yield


@contextmanager
def drawn_layer_by_layer():
    """Every layer gets the same number of channels."""
    groups = resolve("neurograft.selectors._quota.groups")
    with patched("neurograft.selectors._quota", "groups", lambda scores, per: groups(scores, "layer")):
        yield


@contextmanager
def gradients_of_the_neighbours():
    """Each column gets the gradient of the column beside it."""
    route = resolve("neurograft.core.compact.gradients.Route")
    whole = route.gradient

    def beside(self, x, g):
        found = whole(self, x, g)
        return found.roll(1, 0) if self.region.layout == "cols" else found

    with patched(route, "gradient", beside):
        yield


BROKEN = (rows_are_trained_and_not_columns, drawn_layer_by_layer, gradients_of_the_neighbours)


def channels(model, ids):
    """Return FFN channels by layer, with the numbers they write with."""
    found = sites(model, "neuron")
    chosen = Selection.of(found, dict(zip(found, ids)))
    return chosen.of_parts(2)


def test_the_recipe_trains_columns_of_down_drawn_over_all_layers():
    model = pico("llama", num_hidden_layers=4)
    before = snapshot(model)
    counts = []
    for seed in range(4):
        out = run("s2ft", model, rows_of(model), changes={"fraction": 0.1, "warmup": 0.0, "lr": 1e-2}, seed=seed)
        found = list(out.where.counts().values())
        assert sum(found) == round(0.1 * 4 * 48)
        counts.append(found)
    assert len({tuple(c) for c in counts}) > 1
    assert any(len(set(c)) > 1 for c in counts)
    out.graft.apply(model)
    changed = moved(before, model)
    for ids, layer in zip(out.where.ids.values(), range(4)):
        down = f"model.layers.{layer}.mlp.down_proj.weight"
        columns = changed.pop(down, torch.empty(0, dtype=torch.int64)) % 48
        assert set(columns.tolist()) == set(ids.tolist())
    assert not changed
    out.graft.remove(model)
    assert not moved(before, model)


def test_heads_train_columns_of_the_output_projection():
    model = pico("llama")
    before = snapshot(model)
    changes = {"fraction": 0.05, "heads": 0.25, "warmup": 0.0, "lr": 1e-2}
    out = run("s2ft", model, rows_of(model), changes=changes)
    out.graft.apply(model)
    changed = moved(before, model)
    assert {n.split(".")[-2] for n in changed} <= {"down_proj", "o_proj"}
    heads = {n: set((e % 32 // 8).tolist()) for n, e in changed.items() if "o_proj" in n}
    assert sum(len(h) for h in heads.values()) == 2


def permuted(model, ids):
    """Return a copy of the model's weights with each layer's chosen channels first."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for layer, chosen in enumerate(ids):
        n = model.config.intermediate_size
        order = torch.tensor([*chosen, *(i for i in range(n) if i not in chosen)])
        prefix = f"model.layers.{layer}.mlp."
        for part in ("gate_proj", "up_proj"):
            state[f"{prefix}{part}.weight"] = state[f"{prefix}{part}.weight"][order]
        state[f"{prefix}down_proj.weight"] = state[f"{prefix}down_proj.weight"][:, order]
    return state


IDS = [[3, 11, 40], [0, 7]]


def test_the_co_permuted_base_says_the_same():
    model = pico("llama", dtype=torch.float64)
    batch = pico_batch(model)
    found = functional_call(model, permuted(model, IDS), (), batch)
    torch.testing.assert_close(found.logits, model(**batch).logits, rtol=0, atol=1e-12)


def test_gathered_columns_train_like_the_permuted_dense_slice():
    """A literal twin: the reference's layout, its first columns an ordinary parameter, plain AdamW."""
    model = pico("llama", dtype=torch.float64)
    batches = [pico_batch(model, seed=s) for s in range(4)]
    state = permuted(model, IDS)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    first = [nn.Parameter(state[n][:, : len(i)].clone()) for n, i in zip(names, IDS)]
    optimizer = torch.optim.AdamW(first, lr=1e-2, weight_decay=0.0)
    for batch in batches:
        for name, theta, chosen in zip(names, first, IDS):
            state[name] = torch.cat([theta, state[name][:, len(chosen) :].detach()], 1)
        functional_call(model, state, (), batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with attach(model, channels(model, IDS)) as live:
        ours = torch.optim.AdamW(live.parameters(), lr=1e-2, weight_decay=0.0)
        for batch in batches:
            model(**batch).loss.backward()
            ours.step()
            ours.zero_grad()
        for name, theta in zip(names, first):
            torch.testing.assert_close(live.named_parameters()[name].t(), theta, rtol=0, atol=1e-6)


def test_partial_gradients_are_slices_of_the_dense_one():
    model = pico("llama", dtype=torch.float64)
    batch = pico_batch(model)
    model(**batch).loss.backward()
    dense = {n: p.grad.clone() for n, p in model.named_parameters()}
    with attach(model, channels(model, IDS)) as live:
        model(**batch).loss.backward()
        for (name, theta), ids in zip(live.named_parameters().items(), IDS):
            torch.testing.assert_close(theta.grad.t(), dense[name][:, ids], rtol=0, atol=1e-10)


def test_saved_activations_shrink_to_the_share_of_columns():
    x = torch.randn(32, 64)
    sizes = {}
    for k in (4, 16, 64):
        net = nn.Linear(64, 8, bias=False)
        site = Site("w", "column", 64, (Part.columns("weight", (8, 64)),))
        with attach(net, Selection.of({"w": site}, {"w": range(k)})), saving() as saved:
            net(x)
            sizes[k] = saved()
    assert sizes[64] - sizes[16] == 32 * 48 * 4
    assert sizes[16] - sizes[4] == 32 * 12 * 4


def test_disjoint_grafts_add_up_and_come_off_in_any_order():
    model = pico("llama")
    before, rows = snapshot(model), [pico_batch(model, seed=s) for s in range(2)]
    grafts = []
    for ids, batch in zip(([[1, 2], [3]], [[5], [6, 9]]), rows):
        with attach(model, channels(model, ids)) as live:
            fit(live, [batch], steps=3, lr=1e-2)
            grafts.append(live.graft())
    alone = []
    for graft in grafts:
        with graft.on(model):
            alone.append({n: p.detach().clone() for n, p in model.named_parameters()})
    with (grafts[0] + grafts[1]).on(model):
        for name, parameter in model.named_parameters():
            mine, theirs = alone[0][name] != before[name], alone[1][name] != before[name]
            assert not bool((mine & theirs).any())
            expected = torch.where(mine, alone[0][name], torch.where(theirs, alone[1][name], before[name]))
            assert torch.equal(parameter, expected)
    grafts[0].apply(model)
    grafts[1].apply(model)
    grafts[0].remove(model)
    assert set(moved(before, model)) == set(grafts[1].deltas)
    grafts[1].remove(model)
    assert not moved(before, model)


@effect
def test_the_gradient_finds_planted_channels_and_chance_does_not():
    """3 of 48 channels of each of 2 layers moved by the teacher, 3 seeds; chance finds 1 in 16.

    The bar of .8 is ours, set before the first run, and missed: the teacher's error also pulls at channels that are
    active on the same tokens.
    """
    table = {"gradient": [], "random": []}
    score = recipe("s2ft", score="G").steps[0]["by"][1]
    for seed in range(3):
        model = llama(seed, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
        found = sites(model, "neuron")
        drawn = resolve("neurograft.locators.noise")(Context(model, found, seed=seed))
        planted = drawn.top(count=3, per="layer").of_parts(2)
        world = planted_delta(model, planted, scale=1.0, count=20, seed=seed)
        writes = {n: s.with_parts(2) for n, s in found.items()}
        scores = gradient(Context(model, writes, world.train, loss=world.loss), **score)
        table["gradient"].append(world.truth.found(scores.top(count=3, per="layer"))["recall"])
        table["random"].append(world.truth.found(planted.random_like(seed=seed))["recall"])
    note(**{f"recall_{k}": v for k, v in table.items()})
    bar("planted channels found by the gradient", table["gradient"], at_least=0.8, missed=True)
    assert sum(table["gradient"]) > sum(table["random"])
    assert sum(table["random"]) / 3 < 0.2


@effect
def test_less_is_lost_than_by_full_fine_tuning_at_equal_target_loss():
    """A new task learned to one loss; KL on the tasks the base knew, 3 seeds."""
    table = {"s2ft": [], "full": []}
    for seed in range(3):
        model = base(seed)
        found = sites(model, "neuron")
        drawn = resolve("neurograft.locators.noise")(Context(model, found, seed=seed))
        chosen = resolve("neurograft.selectors.only")(drawn, fraction=0.1, parts="writes")
        table["s2ft"].append(held_out_at(model, chosen, lr=1e-2, seed=seed))
        table["full"].append(held_out_at(model, None, lr=1e-3, seed=seed))
    note(**{f"held_out_kl_{k}": v for k, v in table.items()})
    assert sum(table["s2ft"]) < sum(table["full"])
