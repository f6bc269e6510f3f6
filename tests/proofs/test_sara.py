"""SaRA: numbers near zero are trained compactly, pressed to a low rank, and fixed where they have grown."""

import math
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose
from neurograft.core.context import Context, Step, Trained
from neurograft.core.errors import RequestError
from neurograft.core.region import Region
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.locators.within import within
from neurograft.objectives.denoising import denoising
from neurograft.objectives.nuclear import nuclear
from neurograft.pipeline.attach import attach
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import fit as plain_fit
from tests.proofs import bar, effect, note, patched
from tests.proofs._digits import TRAINED, digits, order
from tests.proofs._selective import adam_twin, chosen, entries_of, rows_of, twins, weighed
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "sara", "tiny"


@contextmanager
def the_largest_are_trained():
    """The threshold is a lower bar."""
    threshold = resolve("neurograft.selectors.threshold")

    def turned(scores, *, above=None, below=None):
        return threshold(scores, above=below, below=above)

    with patched("neurograft.selectors.threshold", "threshold", turned):
        yield


@contextmanager
def moments_are_kept():
    """What goes on after the middle keeps its moments."""
    carry = resolve("neurograft.train.optimizers.carry")
    with patched("neurograft.train.conductor", "carry", lambda *args, keep: carry(*args, keep=True)):
        yield


@contextmanager
def only_the_strongest_direction_is_pressed():
    """The norm is the largest singular value and not their sum."""
    values = torch.linalg.svdvals
    with patched(torch.linalg, "svdvals", lambda matrix: values(matrix)[:1]):
        yield


BROKEN = (the_largest_are_trained, moments_are_kept, only_the_strongest_direction_is_pressed)
T = 2e-3


def test_the_recipe_trains_all_numbers_below_the_threshold_and_nothing_else():
    model = pico("llama")
    before = snapshot(model)
    out = run("sara", model, rows_of(model), changes={"lr": 1e-4, "batch": 8, "epochs": 1})
    assert not moved(before, model)
    small = {n: (w.reshape(-1).abs() < T).nonzero().reshape(-1) for n, w in before.items()}
    small = {n: flat for n, flat in small.items() if len(flat)}
    trained = entries_of(out.where)
    assert trained.keys() == small.keys()
    assert all(torch.equal(trained[n], flat) for n, flat in small.items())
    with out.graft.on(model):
        changed = moved(before, model)
    assert changed.keys() == small.keys()
    for name, flat in changed.items():
        assert set(flat.tolist()) <= set(small[name].tolist())
    assert sum(map(len, changed.values())) > 0.8 * sum(map(len, small.values()))  # but rows of tokens not met
    assert recipe("sara").steps[2]["args"]["learning_rate"] == pytest.approx(1e-3 * math.exp(-0.7))


def test_it_starts_as_the_base_and_its_gradients_are_the_dense_ones_below_the_threshold():
    """No number starts as its size."""
    model = pico("llama", dtype=torch.float64)
    batch, where = pico_batch(model), chosen("sara", model)
    first = model(**batch)
    first.loss.backward()
    dense = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with attach(model, where) as live:
        out = model(**batch)
        assert torch.equal(out.logits, first.logits)
        out.loss.backward()
        for name, theta in live.named_parameters().items():
            entries = entries_of(where)[name]
            torch.testing.assert_close(theta.grad.reshape(-1), dense[name].reshape(-1)[entries], rtol=0, atol=1e-10)


def test_the_nuclear_gradient_is_that_of_the_directions_on_what_is_trained():
    """Against U V^T and finite differences; 3 4-5 by hand; the draw names one matrix a step."""
    diagonal = Trained(torch.tensor([3.0, -4.0]), Region.of((20, 20), "flat", [0, 21]), torch.zeros(2))
    step = Step(nn.Identity(), {}, trained=lambda: {"w": diagonal})
    assert float(nuclear(step)) == pytest.approx(7.0)
    rng = generator(0, "sara nuclear")
    weight = torch.randn(20, 24, generator=rng, dtype=torch.float64)
    ids = torch.randperm(480, generator=rng)[:160].sort().values
    values = weight.reshape(-1)[ids].requires_grad_(True)
    region = Region.of((20, 24), "flat", ids)
    nuclear(Step(nn.Identity(), {}, trained=lambda: {"w": Trained(values, region, values.detach())})).backward()
    masked = torch.zeros(480, dtype=torch.float64).index_copy(0, ids, values.detach()).view(20, 24)
    u, _, v = torch.linalg.svd(masked, full_matrices=False)
    torch.testing.assert_close(values.grad, (u @ v).reshape(-1)[ids], rtol=0, atol=1e-10)
    for place in (0, 80, 159):
        nudge = torch.zeros(480, dtype=torch.float64)
        nudge[ids[place]] = 1e-6
        up, down = (torch.linalg.svdvals(masked + s * nudge.view(20, 24)).sum() for s in (1, -1))
        assert abs(float(up - down) / 2e-6 - float(values.grad[place])) < 1e-6
    many = {
        n: Trained(torch.tensor([float(i)]), Region.of((20, 20), "flat", [0]), torch.zeros(1))
        for i, n in enumerate("abcd")
    }
    drawn = [float(nuclear(Step(nn.Identity(), {}, step=i, trained=lambda: many))) for i in range(40)]
    assert set(drawn) == {0.0, 1.0, 2.0, 3.0}
    with pytest.raises(RequestError, match="both sides above 20"):
        nuclear(step, side=20)


def test_numbers_that_have_grown_are_fixed_and_the_rest_goes_on_with_fresh_moments():
    """A dense twin in float64, to 1e-10; optimizer state for what is awake alone."""
    ours, twin, batch = twins()
    before, sizes, history, t, lr = snapshot(ours), [], [], 0.05, 8e-3

    def ask(model, step):
        found = within(Context(model, sites(model, "module")), by="magnitude", entries=True)
        return choose("selectors", "threshold", below=t)(found)

    first = ask(ours, 0)
    with attach(ours, first) as live:
        fit(
            live,
            [batch],
            steps=9,
            lr=lr,
            weight_decay=1e-2,
            optimizer=weighed(sizes, "exp_avg"),
            schedule=("every", {"steps": 5, "until": 5, "moments": "drop"}),
            reselect=ask,
            max_norm=None,
            objective=lambda model, given: model(**given).loss,
            evaluate=lambda step: history.append(snapshot(ours)),
        )
        trained = snapshot(ours)
    still = sum(int((p.abs() < t).sum()) for p in history[4].values())
    assert sizes == [len(first)] * 5 + [still] * 4
    assert 0.3 * len(first) < still < 0.9 * len(first)
    for name, middle in history[4].items():
        grown = middle.abs() >= t
        assert torch.equal(trained[name][grown], middle[grown])
        never = before[name].abs() >= t
        assert torch.equal(trained[name][never], before[name][never])

    def masks(step):
        return {n: p.detach().abs() < t for n, p in twin.named_parameters()} if step in (0, 5) else None

    adam_twin(twin, lambda: twin(**batch).loss, masks, steps=9, lr=lr, decay=1e-2, moments="drop")
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(trained[name], weight.detach(), rtol=0, atol=1e-10)


LEVELS = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 40), 0)


class Denoiser(nn.Module):
    """Says which noise was added to points of the plane; called with points, returns the loss of 4 levels each."""

    def __init__(self, seed, hidden=96):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(10, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2)
            )

    def forward(self, points, level, noise):
        kept = LEVELS[level][:, None]
        seen = kept.sqrt() * points + (1 - kept).sqrt() * noise
        phase = level[:, None] / 40 * torch.tensor([0.5, 1.0, 2.0, 4.0]) * math.pi
        said = self.net(torch.cat([seen, phase.sin(), phase.cos()], 1))
        return SimpleNamespace(loss=F.mse_loss(said, noise))


def points(kind, count, seed, batch=128):
    """Return batches of noisy points of a ring, or of two arcs beside each other."""
    rng, found = generator(seed, "sara points", kind), []
    for _ in range(count):
        angle = torch.rand(batch, generator=rng) * 2 * math.pi
        place = torch.stack([angle.cos(), angle.sin()], 1)
        if kind == "arcs":
            place[:, 1] = place[:, 1].abs() * torch.where(angle < math.pi, 1.0, -1.0)
            place = place + torch.where(angle < math.pi, -0.5, 0.5)[:, None]
        noise = torch.randn(batch, 2, generator=rng)
        level = torch.randint(40, (batch,), generator=rng)
        found.append({"points": place + 0.05 * torch.randn(batch, 2, generator=rng), "level": level, "noise": noise})
    return found


@cache
def denoiser(seed):
    """Return a denoiser trained on the ring; shared, to be left as found."""
    return plain_fit(Denoiser(seed), points("ring", 400, seed), lr=3e-3)


def prepare():
    """Train the denoisers."""
    for seed in range(3):
        denoiser(seed)


@torch.no_grad()
def loss_on(model, kind):
    """Return the mean loss on other points."""
    return float(torch.stack([model(**b).loss for b in points(kind, 16, 77)]).mean())


@effect
def test_the_smallest_tenth_of_a_denoiser_matters_less_than_a_random_tenth():
    rise = {"smallest": [], "random": []}
    for seed in range(3):
        model = denoiser(seed)
        start = loss_on(model, "ring")
        scores = within(Context(model, sites(model, "module"), seed=seed), by="magnitude", entries=True)
        for name, where in (
            ("smallest", scores.bottom(fraction=0.1)),
            ("random", scores.top(fraction=0.1).random_like(seed)),
        ):
            without = deepcopy(model)
            for param, flat in entries_of(where).items():
                without.get_parameter(param).data.view(-1)[flat] = 0.0
            rise[name].append(loss_on(without, "ring") - start)
    ratio = [abs(a) / b for a, b in zip(rise["smallest"], rise["random"])]
    bar("rise of the loss without the smallest tenth over that without a random tenth", ratio, at_most=1)
    assert max(ratio) < 1
    note(**rise)


@effect
def test_the_pressure_lowers_the_rank_of_what_is_learned():
    """Stable rank of the change of the middle matrix after tuning on arcs, with and without the nuclear norm."""
    ranks, losses = {0.0: [], 5e-4: []}, {0.0: [], 5e-4: []}
    for seed in range(3):
        model = denoiser(seed)
        scores = within(Context(model, sites(model, "module")), by="magnitude", entries=True)
        for weight in ranks:
            anchor = ("nuclear", {"weight": weight}) if weight else None
            with attach(model, scores.bottom(fraction=0.2)) as live:
                fit(live, points("arcs", 40, seed), steps=300, lr=5e-3, anchor=anchor, objective=loss_of, seed=seed)
                losses[weight].append(loss_on(model, "arcs"))
                graft = live.graft()
            delta = graft.deltas["net.2.weight"]
            before = delta.region.read(model.net[2].weight)
            change = torch.zeros(96 * 96).index_copy(0, delta.region.flat(), delta.values - before).view(96, 96)
            ranks[weight].append(float(change.square().sum() / torch.linalg.svdvals(change)[0] ** 2))
    note(loss_without=losses[0.0], loss_with=losses[5e-4], rank_without=ranks[0.0], rank_with=ranks[5e-4])
    ratio = [a / b for a, b in zip(ranks[5e-4], ranks[0.0])]
    bar("stable rank of the change with the pressure over that without", ratio, at_most=1)
    assert max(ratio) < 1


def images(rows, classes):
    """Return batches of digits 1 x 8 x 8, as they are."""
    return [{"sample": b["pixel_values"][:, :1, ::2, ::2]} for b in digits(rows, classes=classes)]


def of_noise(model, batches):
    """Return the mean loss of a diffusion model on images, at fixed times and noises."""
    with torch.no_grad():
        return float(torch.stack([denoising(Step(model, b)) for b in batches]).mean())


@effect
def test_a_diffusion_model_of_digits_learns_others():
    """diffusers' UNet denoises the digits 0 to 4, then by its smallest fifth the digits 5 to 9; 3 seeds."""
    table = {"before": [], "after": [], "source_before": [], "source_after": []}
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
                norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
            )  # fmt: skip
        train, test = order(seed)[:TRAINED], order(seed)[TRAINED:]
        old, new = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
        with attach(model) as live:
            fit(live, images(train, old), steps=150, lr=2e-3, objective="denoising", decay="linear", seed=seed)
            ready = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.load_state_dict(ready)
        model.eval()
        scores = within(Context(model, sites(model, "module")), by="magnitude", entries=True)
        where = scores.bottom(fraction=0.2)
        table["before"].append(of_noise(model, images(test, new)))
        table["source_before"].append(of_noise(model, images(test, old)))
        with attach(model, where) as live:
            how = {"anchor": ("nuclear", {"weight": 5e-4}), "objective": "denoising", "seed": seed}
            fit(live, images(train, new), steps=100, lr=2e-3, decay="linear", **how)
            graft = live.graft()
        with graft.on(model):
            changed = moved(ready, model)
            assert all(set(flat.tolist()) <= set(entries_of(where)[n].tolist()) for n, flat in changed.items())
            table["after"].append(of_noise(model, images(test, new)))
            table["source_after"].append(of_noise(model, images(test, old)))
    note(**{f"digits_{k}": v for k, v in table.items()})
    assert all(after < before for after, before in zip(table["after"], table["before"]))


def loss_of(model, batch):
    """The denoiser's own loss."""
    return model(**batch).loss
