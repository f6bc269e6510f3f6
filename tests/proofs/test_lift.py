"""LIFT: weights are scored after rank reduction, chosen per matrix at LoRA's cost, and their moments carried over."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.units import Part, Site
from neurograft.locators.magnitude import magnitude
from neurograft.locators.principal import principal
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.selectors.lora_budget import lora_budget
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico
from neurograft.worlds.planted_delta import planted_delta
from neurograft.worlds.tiny import llama
from tests.proofs import bar, effect, note, patched
from tests.proofs._selective import adam_twin, chosen, entries_of, rows_of, twins, weighed
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "lift", "tiny"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@contextmanager
def no_rank_reduction():
    """Weights are scored as they are."""
    with patched("neurograft.locators.principal", "_reduced", lambda w, r, svd, rounds, rng: w):
        yield


@contextmanager
def moments_stay_at_their_place_in_the_list():
    """At a turn the first of the new entries take over the moments of the first of the old ones."""

    def first(one, other):
        both = torch.arange(min(one.numel, other.numel))
        return both, both

    with patched("neurograft.train.optimizers", "shared", first):
        yield


@contextmanager
def one_budget_for_all_matrices():
    """As many weights as all budgets together are taken from all matrices jointly."""
    top = resolve("neurograft.selectors.top")

    def jointly(scores, *, r=8, lowest=False):
        sides = [[count for count, _ in s.parts[0].units] for s in scores.sites.values()]
        return top(scores, count=sum(min(a * b, r * (a + b)) for a, b in sides))

    with patched("neurograft.selectors.lora_budget", "lora_budget", jointly):
        yield


BROKEN = (no_rank_reduction, moments_stay_at_their_place_in_the_list, one_budget_for_all_matrices)


def of_matrix(weight):
    """Return a linear layer with that weight, and a context of its single weights."""
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    with torch.no_grad():
        net.weight.copy_(weight)
    high, wide = weight.shape
    return Context(net, {"w": Site("w", "weight", weight.numel(), (Part("weight", ((high, wide), (wide, 1))),))})


def test_scores_by_hand():
    """Singular values 2 (four ones that go together) and 1.5 (one weight that stands alone)."""
    context = of_matrix(torch.tensor([[1.0, -1, 0], [1, -1, 0], [0, 0, 1.5]]))
    assert principal(context, r=1).values["w"].tolist() == pytest.approx([1, 1, 0, 1, 1, 0, 0, 0, 0], abs=1e-6)
    assert principal(context, r=2).values["w"].tolist() == pytest.approx([1, 1, 0, 1, 1, 0, 0, 0, 1.5], abs=1e-6)


def test_at_full_rank_it_is_plain_magnitude():
    context = of_matrix(torch.randn(12, 20, generator=generator(0, "lift full")))
    plain = lora_budget(magnitude(context), r=2)
    for r in (12, 128):
        assert torch.equal(lora_budget(principal(context, r=r), r=2).ids["w"], plain.ids["w"])
    assert not torch.equal(lora_budget(principal(context, r=3), r=2).ids["w"], plain.ids["w"])


def test_random_directions_come_near_the_exact_ones():
    rng = generator(0, "lift random svd")
    weight = torch.randn(64, 4, generator=rng) @ torch.randn(4, 96, generator=rng) + torch.randn(64, 96, generator=rng)
    context = of_matrix(weight)
    exact, near = (principal(context, r=4, svd=svd).values["w"] for svd in ("exact", "random"))
    assert float((exact - near).norm() / exact.norm()) < 1e-2
    assert not torch.equal(exact, near)


def test_the_recipe_trains_the_budget_of_each_projection_and_nothing_else():
    model = pico("llama")
    before = snapshot(model)
    graft = run("lift", model, rows_of(model), changes={"r": 4, "budget": 2, "lr": 1e-3, "batch": 8}).graft
    assert not moved(before, model)
    graft.apply(model)
    changed = moved(before, model)
    assert set(changed) == {n for n in before if any(f".{p}." in n for p in PROJECTIONS)}
    for name, flat in changed.items():
        u, s, v = torch.linalg.svd(before[name], full_matrices=False)
        scores = (u[:, :4] @ torch.diag(s[:4]) @ v[:4]).abs().reshape(-1)
        assert torch.equal(flat, scores.topk(2 * sum(before[name].shape)).indices.sort().values)
    graft.remove(model)
    assert not moved(before, model)


def test_choices_made_anew_and_moments_are_those_of_a_dense_twin():
    """Every 3 steps a new mask from the current weights; in float64, to 1e-10; moments exist for the mask alone.

    On a network without norms, which transformers computes in float32 whatever the model's type.
    """
    betas, eps, lr = (0.9, 0.95), 1e-6, 3e-2
    ours, twin, batch = twins()
    before, sizes, picks = snapshot(ours), [], []

    def ask(model, step):
        picks.append(lora_budget(principal(Context(model, sites(model, "weight")), r=2), r=2))
        return picks[-1]

    with attach(ours, ask(ours, 0)) as live:
        fit(
            live,
            [batch],
            steps=8,
            lr=lr,
            optimizer=(weighed(sizes, "exp_avg", "exp_avg_sq"), {"betas": betas, "eps": eps}),
            schedule=("every", {"steps": 3}),
            reselect=ask,
            max_norm=None,
            objective=lambda model, given: model(**given).loss,
        )
        trained = snapshot(ours)
        graft = live.graft()
    assert sizes == [2 * len(picks[0])] * 8
    stay = [len(a & b) / len(a) for a, b in pairwise(picks)]
    assert all(0.2 < share < 0.98 for share in stay), "turns that carry some moments and drop some"

    def masks(step):
        if step % 3:
            return None
        found = {}
        for name, weight in twin.named_parameters():
            if weight.dim() == 2:
                u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
                best = (u[:, :2] @ torch.diag(s[:2]) @ v[:2]).abs().reshape(-1).topk(2 * sum(weight.shape)).indices
                found[name] = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, best, True).view_as(weight)
        return found

    adam_twin(twin, lambda: twin(**batch).loss, masks, steps=8, lr=lr, betas=betas, eps=eps)
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(trained[name], weight.detach(), rtol=0, atol=1e-10)
    union = [entries_of(p) for p in picks]
    graft.apply(ours)
    changed = moved(before, ours)
    assert set(changed) == set(union[0])
    for name, flat in changed.items():
        assert set(flat.tolist()) <= set(torch.cat([u[name] for u in union]).tolist())
        assert len(flat) > len(union[0][name]), "what was left keeps what it learned"


def planted(seed):
    """A block 12 x 16 of rank 1 with numbers about 1, as many single weights of 2, noise of 0.2, in 64 x 96."""
    rng = generator(seed, "lift planted")
    rows, columns = torch.randperm(64, generator=rng)[:12], torch.randperm(96, generator=rng)[:16]
    u, v = ((0.5 + torch.rand(n, generator=rng)) * torch.randn(n, generator=rng).sign() for n in (12, 16))
    weight, block = 0.2 * torch.randn(64, 96, generator=rng), torch.zeros(64, 96, dtype=torch.bool)
    weight[rows[:, None], columns] += torch.outer(u, v)
    block[rows[:, None], columns] = True
    outside = (~block).reshape(-1).nonzero().reshape(-1)
    alone = outside[torch.randperm(len(outside), generator=rng)[:192]]
    weight.view(-1)[alone] = 2.0 * torch.randn(192, generator=rng).sign()
    return weight, block.reshape(-1)


def test_a_block_that_goes_together_is_found_among_larger_single_weights():
    recall = {"principal": [], "magnitude": []}
    for seed in range(4):
        weight, block = planted(seed)
        context = of_matrix(weight)
        for name, scores in (("principal", principal(context, r=1)), ("magnitude", magnitude(context))):
            recall[name].append(float(block[scores.top(count=192).ids["w"]].float().mean()))
    bar("recall of the planted block after reduction to rank 1", recall["principal"], at_least=0.6)
    bar("recall of the planted block by plain magnitude", recall["magnitude"], at_most=0.35)
    assert min(recall["principal"]) >= 0.6
    assert max(recall["magnitude"]) <= 0.35


@effect
def test_a_teacher_that_moved_what_lift_chooses_is_reached_by_lift_alone():
    """The teacher moves the top entries of W_r; equal budgets; 3 seeds."""
    table = {"start": [], "lift": [], "magnitude": [], "random": []}
    for seed in range(3):
        model = llama(seed, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_key_value_heads=4)
        choices = {
            "lift": chosen("lift", model, r=4, budget=2),
            "magnitude": chosen("lift", model, r=512, budget=2),
            "random": chosen("shira", model, r=2),
        }
        assert len({len(c) for c in choices.values()}) == 1
        world = planted_delta(model, choices["lift"], scale=1.0, count=8, seed=seed)
        table["start"].append(world.distance(model))
        for name, where in choices.items():
            with attach(model, where) as live:
                fit(live, world.train, steps=100, lr=1e-2, objective=world.loss, decay="linear")
                table[name].append(world.distance(model.eval()))
    note(**table)
    rivals = [min(m, r) for m, r in zip(table["magnitude"], table["random"])]
    ratios = [ours / other for ours, other in zip(table["lift"], rivals)]
    bar("loss of LIFT over the better of magnitude and random", ratios, at_most=1)
    assert max(ratios) < 1
