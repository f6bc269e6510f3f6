"""ES: a population's z-scores climb any reward, end on a predicted plateau, and find as much in any dimension."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import neurograft as ng
from neurograft.audits.landscape import landscape, peaked
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.numerics.noise import Stream
from neurograft.core.seeds import generator
from neurograft.optimizers.evolution import evolution
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch
from tests.proofs import bar, effect, note, patched
from tests.proofs._forward import better_at_it
from tests.proofs._tools import moved, rows_in, snapshot

PAPER, SCALE = "es-landscape", "tiny"


@contextmanager
def tensors_of_one_shape_share_their_noise():
    """The first fault of the companion's code: every tensor is drawn from the same seed."""

    def draw(self, seed, chunk, count, device):
        return torch.randn(count, generator=generator(seed, "same", chunk))

    with patched(Stream, "draw", draw):
        yield


@contextmanager
def losses_are_not_scored():
    """Directions are worth their losses and not their z-scores."""
    with patched("neurograft.optimizers.evolution", "_z", lambda losses: losses[:, 0] / len(losses)):
        yield


@contextmanager
def the_best_is_taken_for_the_mean():
    """What n probes find is what one finds."""
    with patched("neurograft.audits.landscape", "_best_of", lambda rewards, n: float(rewards.mean())):
        yield


BROKEN = (tensors_of_one_shape_share_their_noise, losses_are_not_scored, the_best_is_taken_for_the_mean)


def population(theta, **options):
    return evolution([{"params": [theta], "name": "x"}], **options)


def test_z_scores_and_step_by_hand():
    """Losses 1, 2, 3: z = (-1, 0, 1), so theta goes by lr / 3 (eps_0 - eps_2), whatever sigma is."""
    theta = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    for sigma in (0.1, 0.5):
        optimizer, before = population(theta, lr=0.3, sigma=sigma, n=3), theta.detach().clone()
        seeds = optimizer.now()
        optimizer.probe(lambda terms, seeds=seeds: 1.0 + seeds.index(terms[0][0]))
        optimizer.step()
        first, _, last = (Stream("x", (2,), 65536).draw(s, 0, 2, theta.device).double() for s in seeds)
        torch.testing.assert_close(theta.detach() - before, 0.1 * (first - last), atol=1e-6, rtol=0)


def test_equal_rewards_move_nothing():
    theta = nn.Parameter(torch.ones(3))
    optimizer = population(theta, lr=1.0, sigma=0.1, n=4)
    optimizer.probe(lambda terms: 0.1)
    optimizer.step()
    assert theta.tolist() == [1.0, 1.0, 1.0]
    assert optimizer.pulls == [[0.0] * 4]
    with pytest.raises(RequestError, match="population"):
        population(theta, n=1)


def test_no_two_tensors_or_neighbouring_seeds_share_noise():
    size, device = 20000, torch.device("cpu")
    drawn = [
        Stream(name, (200, 100), 1 << 16).draw(seed, chunk, size, device)
        for name, seed, chunk in (("a", 7, 0), ("b", 7, 0), ("a", 8, 0), ("a", 7, 1), ("b", 6, 0))
    ]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            both = torch.corrcoef(torch.stack([one, other]))[0, 1]
            assert abs(float(both)) < 5 / math.sqrt(size)
            shifted = torch.corrcoef(torch.stack([one[:-1], other[1:]]))[0, 1]
            assert abs(float(shifted)) < 5 / math.sqrt(size)


def test_bf16_base_is_untouched_and_the_log_rebuilds_the_weights():
    model = pico("llama", dtype=torch.bfloat16)
    before = snapshot(model)
    with attach(model) as live:
        fit(live, [pico_batch(model)], steps=2, lr=0.05, optimizer=("evolution", {"n": 5, "sigma": 0.01}))
        ended, graft = snapshot(model), live.graft()
    assert not moved(before, model)
    fresh = pico("llama", dtype=torch.bfloat16)
    graft.apply(fresh)
    assert not moved(ended, fresh)
    found = landscape(model, Graft(), [pico_batch(model)], probes=4, best=(1, 4), sigma=0.1)
    assert not moved(before, model)
    assert found["base"] == found["changed"]


class Bowl(nn.Module):
    """J = 1 - 1/2 sum over some coordinates of curvature * x^2."""

    def __init__(self, size, curvature, start, *, seed=0):
        super().__init__()
        self.at = torch.randperm(size, generator=generator(seed, "bowl", size))[: len(curvature)]
        self.curvature = curvature
        x = torch.zeros(size)
        x[self.at] = start
        self.x = nn.Parameter(x)

    def forward(self, batch=None):
        x = self.x + 0.0
        return 1 - 0.5 * float((self.curvature * x.detach()[self.at] ** 2).sum())


def test_the_best_of_n_by_hand():
    """Rewards 1, 2, 4 with replacement: the best of two is 1 once, 2 three times, 4 five times in nine."""
    best_of = landscape.__globals__["_best_of"]
    rewards = torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64)
    assert best_of(rewards, 1) == pytest.approx(7 / 3)
    assert best_of(rewards, 2) == pytest.approx((1 + 3 * 2 + 5 * 4) / 9)
    assert best_of(rewards, 1000) == pytest.approx(4.0)


def test_what_thirty_probes_find_does_not_depend_on_the_ambient_dimension():
    """5 active coordinates among 50, 500 and 5000; gain as a share of the headroom, 240 probes, 3 seeds."""
    gains = {}
    for size in (50, 500, 5000):
        runs = [
            landscape(
                Bowl(size, torch.ones(5), 0.3, seed=s),
                Graft(),
                [{}],
                sigma=0.05,
                best=(1, 30),
                reward=lambda model, batch: model(),
                seed=10 * s,
            )["base"]["gain"]
            for s in range(3)
        ]
        gains[size] = sum(g["30"] for g in runs) / 3
        assert abs(sum(g["1"] for g in runs) / 3) < 0.05
    note(**{f"gain_in_{k}": v for k, v in gains.items()})
    assert min(gains.values()) > 0.2
    bar(
        "best-of-30 gain, largest over smallest of three dimensions",
        max(gains.values()) / min(gains.values()),
        at_most=1.1,
    )


def climbed(curvature, start, *, n, alpha, sigma, steps, noise=0.0, seed=0):
    """Run the engine on a bowl; return the course of J and the mean spread of a population's rewards."""
    theta = nn.Parameter(torch.full(curvature.shape, 0.0, dtype=torch.float64) + start)
    optimizer, rng = population(theta, lr=alpha, sigma=sigma, n=n, seed=seed), generator(seed, "reward")
    stream, course, spread = Stream("x", tuple(theta.shape), optimizer.grain), [], []
    for _ in range(steps):
        shakes, asked = noise * torch.randn(n, dtype=torch.float64, generator=rng), []

        def ask(terms, shakes=shakes, asked=asked):
            ((seed, scale),) = terms
            x = theta.detach() + scale * stream.draw(seed, 0, len(theta), theta.device)
            asked.append(0.5 * float((curvature * x**2).sum()) + float(shakes[len(asked)]))
            return asked[-1]

        optimizer.probe(ask)
        optimizer.step()
        course.append(1 - 0.5 * float((curvature * theta.detach() ** 2).sum()))
        spread.append(float(torch.tensor(asked).std()))
    return course, spread


def test_under_fixed_settings_the_reward_rises_peaks_and_decays():
    """5 stiff modes to descend, 400 flat ones that fill with noise: a larger population ends higher."""
    curvature = torch.cat([torch.full((5,), 5.0), torch.full((400,), 0.5)]).double()
    start = torch.cat([torch.full((5,), 0.3), torch.zeros(400)]).double()
    ends = {}
    for n in (10, 40):
        course, _ = climbed(curvature, start, n=n, alpha=0.05, sigma=0.05, steps=100, noise=0.1)
        found = peaked(course)
        ends[n] = sum(course[-10:]) / 10
        assert found["decays"], found
        assert found["peak"] < 60
    assert ends[40] > ends[10]


@effect
def test_the_plateau_is_where_the_mapped_formula_says():
    """5 modes of curvature 5 and 20 of 0.5, reward noise 1, sigma 0.1, n = 10.

    Alpha 0.1 for 8000 steps: five times the card's, a fifth of its 40 000 steps, which is as many relaxation times.
    Terminal loss alpha s_r / (2 n sigma) * sum of 1 / (2 - a curvature), a = alpha sigma / s_r, s_r the spread seen.
    """
    curvature = torch.cat([torch.full((5,), 5.0), torch.full((20,), 0.5)]).double()
    course, spread = climbed(curvature, 0.0, n=10, alpha=0.1, sigma=0.1, steps=8000, noise=1.0)
    burn = 1000
    loss = 1 - sum(course[burn:]) / len(course[burn:])
    s = sum(spread[burn:]) / len(spread[burn:])
    told = 0.1 * s / (2 * 10 * 0.1) * float((1 / (2 - 0.1 * 0.1 / s * curvature)).sum())
    note(terminal_loss=loss, told=told, spread=s)
    bar("terminal loss, relative distance from the formula", abs(loss / told - 1), at_most=0.12)


@effect
def test_accuracy_itself_is_climbed_on_a_tiny_decoder():
    """LoRA of rank 2 on a new task, minus the accuracy on 64 rows as the loss, 40 populations of 10, 3 seeds."""
    start, end = [], []
    for seed in range(3):
        before, after, *_ = better_at_it(seed, ("evolution", {"sigma": 0.1, "n": 10}), lr=0.3)
        start.append(before)
        end.append(after)
    note(accuracy_before=start, accuracy_after=end)
    assert all(b > a + 0.2 for a, b in zip(start, end)), (start, end)


def test_the_recipe_climbs_a_reward_without_a_gradient():
    model = pico("llama")
    batch = pico_batch(model, batch=8)
    rows = rows_in(batch)
    before = snapshot(model)
    changes = {"lr": 0.02, "sigma": 0.02, "n": 10, "epochs": 5, "batch": 8}
    out = run(
        "es_landscape", model, rows, changes={**changes, "tune.objective": lambda m, b: float(m(**b).loss.detach())}
    )
    assert out.graft.logged
    assert not moved(before, model)
    losses = out.graft.card["losses"]
    assert losses[-1] < losses[0]
    assert out.graft.card["optimizer"]["options"] == {"sigma": 0.02, "n": 10}
    with pytest.raises(RequestError, match="at least two steps"):
        peaked(losses)
    longer = replace(out.graft, card={**out.graft.card, "losses": [*range(30, 0, -1), *range(30)]})
    report = ng.audit(model, longer, keep={"own": rows}, probes=[("landscape", {"probes": 2, "best": (1, 2)})])
    assert report.data["domains"]["own"]["landscape"]["course"]["decays"]
