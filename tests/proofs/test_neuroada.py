"""NeuroAda: each output row trains its k largest weights, compactly; a global choice leaves rows untouched."""

from contextlib import contextmanager

import torch

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Scores
from neurograft.locators.magnitude import magnitude
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.planted_delta import planted_delta
from tests.proofs import effect, note, patched
from tests.proofs._selective import chosen, entries_of, rows_of
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "neuroada", "tiny"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@contextmanager
def quota_over_the_matrix():
    """The k entries are taken of each matrix and not of each row."""
    groups = resolve("neurograft.selectors._quota.groups")

    def by_site(scores, per):
        return groups(scores, "site" if per == "row" else per)

    with patched("neurograft.selectors._quota", "groups", by_site):
        yield


@contextmanager
def signed_magnitude():
    """The largest weights are taken by value and not by size."""

    def by_value(context, **options):
        weights = dict(context.model.named_parameters())
        found = {n: weights[s.parts[0].param].detach().reshape(-1).float() for n, s in context.sites.items()}
        return Scores(dict(context.sites), found)

    by_value.card = magnitude.card
    with patched("neurograft.locators.magnitude", "magnitude", by_value):
        yield


@contextmanager
def gradients_of_the_neighbours():
    """Each entry gets the gradient of the entry beside it."""

    def beside(self, a, b):
        (columns,) = self.index
        shifted = (columns + 1) % b.shape[1]
        return torch.stack([(a * b.index_select(1, c)).sum(0) for c in shifted.unbind(1)], 1).reshape(-1)

    with patched(resolve("neurograft.core.compact.gradients.Route"), "_loop", beside):
        yield


BROKEN = (quota_over_the_matrix, signed_magnitude, gradients_of_the_neighbours)


def located(model, *, k, per="row"):
    """Return the entries the recipe's first two steps choose."""
    from neurograft.core.choose import choose
    from neurograft.pipeline.recipe import recipe

    locate, select, _ = recipe("neuroada", k=k, per=per).steps
    scores = choose("locators", locate["by"])(Context(model, sites(model, locate["units"])))
    return choose("selectors", select["by"], count=select["count"], per=select["per"])(scores)


def test_exactly_the_k_largest_entries_of_every_row_move():
    model = pico("llama")
    before = snapshot(model)
    graft = run("neuroada", model, rows_of(model), changes={"k": 2, "warmup": 0.0, "batch": 8}).graft
    assert not moved(before, model)
    graft.apply(model)
    changed = moved(before, model)
    expected = [n for n in before if any(f".{p}." in n for p in PROJECTIONS)]
    assert set(changed) == set(expected)
    for name in expected:
        weight = before[name]
        best = weight.abs().topk(2, dim=1).indices + torch.arange(len(weight))[:, None] * weight.shape[1]
        assert torch.equal(changed[name], best.reshape(-1).sort().values)
    graft.remove(model)
    assert not moved(before, model)


def test_the_ablations_take_the_smallest_a_random_or_the_most_pulled_entry_of_every_row():
    model = pico("llama")
    rows, weight = rows_of(model), "model.layers.0.mlp.up_proj.weight"
    values = model.get_parameter(weight).detach()
    model(**pico_batch(model, batch=8)).loss.backward()
    pull = model.get_parameter(weight).grad.abs()
    model.zero_grad()
    found = {}
    for name, options in {"smallest": {"smallest": True}, "random": {"score": "random"},
                          "gradient": {"score": "gradient"}}.items():  # fmt: skip
        flat = entries_of(chosen("neuroada", model, rows, k=1, **options))[weight]
        assert torch.equal(flat // values.shape[1], torch.arange(len(values))), "one of every row"
        found[name] = flat % values.shape[1]
    assert torch.equal(found["smallest"], values.abs().argmin(1))
    assert torch.equal(found["gradient"], pull.argmax(1))
    assert len({tuple(columns.tolist()) for columns in found.values()}) == 3


def test_compact_gradients_are_the_dense_ones_gathered():
    model = pico("llama", dtype=torch.float64)
    batch = pico_batch(model)
    where = located(model, k=2)
    model(**batch).loss.backward()
    dense = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with attach(model, where) as live:
        model(**batch).loss.backward()
        for name, theta in live.named_parameters().items():
            entries = where.ids[name.removesuffix(".weight") + "/weight"]
            torch.testing.assert_close(theta.grad, dense[name].reshape(-1)[entries], rtol=0, atol=1e-10)


def test_a_forward_with_scattered_deltas_is_the_compact_forward_and_the_merged_one():
    model = pico("llama", dtype=torch.float64)
    batch = pico_batch(model)
    where = located(model, k=1)
    rng = generator(0, "neuroada deltas")
    deltas = {n: torch.randn(len(i), generator=rng, dtype=torch.float64) for n, i in where.ids.items() if len(i)}
    with attach(model, where, route="side") as live:
        with torch.no_grad():
            for name, theta in live.named_parameters().items():
                theta += deltas[name.removesuffix(".weight") + "/weight"]
        beside = model(**batch).logits.detach()
        graft = live.graft()
    with torch.no_grad():
        for name, ids in where.ids.items():
            if len(ids):
                model.get_parameter(name.removesuffix("/weight") + ".weight").view(-1)[ids] += deltas[name]
        scattered = model(**batch).logits
        for name, ids in where.ids.items():
            if len(ids):
                model.get_parameter(name.removesuffix("/weight") + ".weight").view(-1)[ids] -= deltas[name]
    torch.testing.assert_close(beside, scattered, rtol=0, atol=1e-10)
    fresh = pico("llama", dtype=torch.float64)
    graft.apply(fresh)
    torch.testing.assert_close(fresh(**batch).logits.detach(), scattered, rtol=0, atol=1e-10)


@effect
def test_a_row_quota_reaches_a_teacher_that_moved_every_row_a_global_one_does_not():
    """The teacher moves the largest entry of every row; equal budgets; 3 seeds."""
    table = {"start": [], "row": [], "global": []}
    for seed in range(3):
        model = pico("llama", seed=seed, num_hidden_layers=1)
        per_row = located(model, k=1)
        everywhere = located(model, k=len(per_row), per="global")
        assert len(per_row) == len(everywhere)
        world = planted_delta(model, per_row, scale=3.0, count=6, seed=seed)
        table["start"].append(world.distance(model))
        for name, where in (("row", per_row), ("global", everywhere)):
            with attach(model, where) as live:
                fit(live, world.train, steps=150, lr=1e-2, objective=world.loss, decay="linear")
                table[name].append(world.distance(model.eval()))
    note(**table)
    for start, row, over_all in zip(table["start"], table["row"], table["global"]):
        assert row < 0.05 * start
        assert over_all > 0.1 * start
