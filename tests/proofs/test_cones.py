"""Cones: what shutting a weight saves, along a shrinking path; a few weights shut make a denoiser draw a subject."""

import json
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.choose import choose
from neurograft.core.context import Context, Step
from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import Shut
from neurograft.core.grafts.graft import Graft
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.edits.shut import shut
from neurograft.locators import shutting as room
from neurograft.locators.shutting import shutting
from neurograft.objectives.denoising import denoising, scheduled
from neurograft.pipeline.edit import edit
from neurograft.pipeline.run import run
from neurograft.pipeline.select import select
from neurograft.recipes.cones import LAYERS
from neurograft.worlds.pico import pico
from neurograft.worlds.shapes import NOISE, denoiser
from tests.proofs import bar, effect, note, patched
from tests.proofs._concepts import WORDS, losses, subject, trained
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "cones", "identity"


@contextmanager
def what_helps_is_shut():
    """Scores have the other sign: the weights to keep are shut."""
    added = room.summed
    with patched(room, "summed", lambda part, tensor: -added(part, tensor)):
        yield


@contextmanager
def the_path_does_not_care_for_size():
    """The path is gradient descent on the weights: theta - rho * dL/dtheta."""
    with patched(room, "shrunk", lambda theta, gain, rho: theta - rho * gain / theta):
        yield


@contextmanager
def every_step_meets_the_same_noise():
    """The loss is not told the number of the step, and draws the same times and noises each time."""
    scalar = Context.scalar
    with patched(Context, "scalar", lambda self, batch, step=0: scalar(self, batch)):
        yield


BROKEN = (what_helps_is_shut, the_path_does_not_care_for_size, every_step_meets_the_same_noise)


class Linear(nn.Module):
    """y = x @ w, with half the squared error as its loss."""

    def __init__(self, weight):
        super().__init__()
        self.read = nn.Linear(len(weight), 1, bias=False)
        self.read.weight.data = weight[None].clone()

    def forward(self, x, y):
        return SimpleNamespace(loss=0.5 * (self.read(x)[:, 0] - y).pow(2).mean())


def loss(model, batch):
    return model(**batch).loss


def scores_of(model, batches, **options):
    """Return the scores of a linear model's entries, [n]."""
    where = sites(model, "weight")
    options = {"batch_size": len(batches[0]["x"]), **options}
    (values,) = shutting(Context(model, where, batches, loss=loss), **options).values.values()
    return values


def test_a_score_is_the_first_order_effect_and_its_error_falls_fourfold():
    """L = (2 - w_0 x - w_1)^2 / 2 by hand, at w = (3, -1), x = 1: residual 0, then with the target 1 it is 1."""
    model = Linear(torch.tensor([3.0, -1.0]))
    batch = {"x": torch.tensor([[1.0, 1.0]]), "y": torch.tensor([1.0])}
    # residual 3 - 1 - 1 = 1, gradient (1, 1), theta * g = (3, -1): the first is to be shut.
    assert scores_of(model, [batch], rho=0.0).tolist() == [3.0, -1.0]
    rng = generator(0, "cones linear")
    x, y, w = torch.randn(40, 6, generator=rng), torch.randn(40, generator=rng), torch.randn(6, generator=rng)
    model, batch = Linear(w), {"x": x, "y": y}
    score, hessian = scores_of(model, [batch], rho=0.0), x.pow(2).mean(0)
    start = loss(model, batch).item()
    where = sites(model, "weight")
    for i in range(6):
        with shut(Context(model, where), Selection.of(where, {"read/weight": [i]})).on(model):
            exact = loss(model, batch).item() - start
        assert exact == pytest.approx(float(-score[i] + w[i] ** 2 * hessian[i] / 2), abs=1e-5)
    errors = []
    for share in (1.0, 0.5, 0.25):
        less = Linear(w * (1 - share))
        linear = start - share * float(score.sum())
        errors.append(loss(less, batch).item() - linear)
    assert errors[0] / errors[1] == pytest.approx(4, rel=1e-3)
    assert errors[1] / errors[2] == pytest.approx(4, rel=1e-3)
    note(first_order_errors=errors)


def test_the_path_is_descent_on_the_logarithm_of_the_mask():
    """A literal twin; by hand; and log m falls by rho * dL/dlog m, to first order in rho. The model comes back."""
    model = Linear(torch.tensor([3.0, -1.0]))
    batch = {"x": torch.tensor([[1.0, 1.0]]), "y": torch.tensor([1.0])}
    # first (3, -1) with effect (3, -1); at rho = 0.1 on to (3 * 0.7, -1 * 1.1): residual 0, effect (0, 0).
    assert scores_of(model, [batch], steps=2, rho=0.1).tolist() == pytest.approx([3.0, -1.0], abs=1e-6)
    rng = generator(1, "cones path")
    x, y, w = torch.randn(32, 5, generator=rng), torch.randn(32, generator=rng), torch.randn(5, generator=rng)
    batches = [{"x": x[:16], "y": y[:16]}, {"x": x[16:], "y": y[16:]}]
    model = Linear(w)
    before = snapshot(model)
    found = scores_of(model, batches, steps=7, rho=0.05)
    assert not moved(before, model)
    theta, total = w.double(), torch.zeros(5, dtype=torch.float64)
    for step in range(7):
        b = batches[step % 2]
        g = ((b["x"].double() @ theta - b["y"]) @ b["x"].double()) / 16
        total, theta = total + theta * g, theta * (1 - 0.05 * theta * g)
    torch.testing.assert_close(found, total.float(), rtol=1e-4, atol=1e-5)
    assert (scores_of(model, batches, steps=7, rho=0.0) - found).abs().max() > 0.05
    for rho in (1e-2, 1e-3):
        s = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        (0.5 * (x.double() @ (w * s.exp()) - y).pow(2).mean()).backward()
        log_step = (1 - rho * w * ((x.double() @ w.double() - y) @ x.double()) / 32).log()
        assert (log_step + rho * s.grad).abs().max() < 2 * (rho * s.grad).pow(2).max()


def test_a_rate_of_stable_diffusion_leaves_a_tiny_model_where_it_is():
    """At rho = 2e-5 the scores are those of rho = 0 to 1 in 1,000; at a rate of the loss's size they are not."""
    model, batch = denoiser(), joined("checkered")
    where = keys_and_values(model)
    given = Context(model, where, [batch], asked=choose("objectives", "denoising", scheduler=NOISE))
    before = snapshot(model)
    still, paper, brisk = (_flat(shutting(given, steps=2, rho=rho, batch_size=8)) for rho in (0.0, 2e-5, 300.0))
    assert not moved(before, model)
    assert (still - paper).norm() < 1e-3 * still.norm()
    assert (still - brisk).norm() > 0.01 * still.norm()


def test_every_step_draws_anew_and_scores_add_up():
    model, batch = denoiser(), joined("checkered")
    where, asked = keys_and_values(model), choose("objectives", "denoising", scheduler=NOISE)
    total = {n: torch.zeros(p.shape) for n, p in model.named_parameters() if "attn2.to_" in n}
    for step in range(3):
        model.zero_grad()
        asked(Step(model, batch, step=step)).backward()
        for name in total:
            weight = model.get_parameter(name)
            total[name] += weight.detach() * weight.grad
    model.zero_grad(set_to_none=True)
    found = shutting(Context(model, where, [batch], asked=asked), steps=3, rho=0.0, batch_size=8)
    assert len(found.values) == 6
    for site, values in found.values.items():
        torch.testing.assert_close(values, total[f"{site.split('/')[0]}.weight"].reshape(-1), rtol=1e-4, atol=1e-7)


class Echo(nn.Module):
    """A denoiser that says half of what it sees, plus what it is told."""

    config = SimpleNamespace(_name_or_path="")

    def forward(self, sample, timestep, encoder_hidden_states):
        self.seen = (sample, timestep)
        return SimpleNamespace(sample=0.5 * sample + encoder_hidden_states.mean((1, 2))[:, None, None, None])


def test_the_loss_is_dreambooths():
    """Against add_noise written out, for each kind of prediction; the prior term has its weight."""
    rng = generator(0, "cones loss")
    x, prior, told = (torch.randn(3, 1, 4, 4, generator=rng) for _ in range(3))
    told = told.reshape(3, 2, 8)
    for kind in ("epsilon", "v_prediction", "sample"):
        noise = {**NOISE, "prediction_type": kind}
        kept = scheduled(nn.Identity(), noise).alphas_cumprod
        parts = []
        for image, words in ((x, told), (prior, 2 * told)):
            model = Echo()
            value = float(denoising(Step(model, {"sample": image, "encoder_hidden_states": words}), scheduler=noise))
            noisy, times = model.seen
            a = kept[times][:, None, None, None]
            eps = (noisy - a.sqrt() * image) / (1 - a).sqrt()
            velocity = a.sqrt() * eps - (1 - a).sqrt() * image
            wanted = {"epsilon": eps, "v_prediction": velocity, "sample": image}[kind]
            said = 0.5 * noisy + words.mean((1, 2))[:, None, None, None]
            assert value == pytest.approx(float((said - wanted).pow(2).mean()), rel=1e-4)
            parts.append(value)
        both = {"sample": x, "encoder_hidden_states": told}
        both |= {"prior_sample": prior, "prior_encoder_hidden_states": 2 * told}
        for weight in (0.0, 1.0, 0.3):
            value = float(denoising(Step(Echo(), both), prior=weight, scheduler=noise))
            assert value == pytest.approx(parts[0] + weight * parts[1], rel=1e-5)


def keys_and_values(model, layers="cross"):
    """Return the single weights of the keys and values of attention."""
    return sites(model, "weight", match=list(LAYERS[layers]))


def joined(name):
    """Return a subject's rows as one batch."""
    rows = subject(name)
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


def _flat(scores):
    return torch.cat(list(scores.values.values()))


def test_a_file_holds_indices_and_no_values():
    """1 % of the entries, against the floats of all keys and values; the union of two masks is that of their sets."""
    model = denoiser(block_out_channels=(64,), cross_attention_dim=96)
    where = keys_and_values(model)
    total = sum(s.n for s in where.values())
    one, two = (select(noise_scores(model, where, seed), fraction=0.01) for seed in (0, 1))
    graft = shut(Context(model, where), one)
    with tempfile.TemporaryDirectory() as folder:
        data = (graft.save(folder) / "graft.safetensors").read_bytes()
        again = Graft.load(folder)
    size = len(data) - 8 - int.from_bytes(data[:8], "little")
    note(
        bytes_of_indices=size, bytes_of_all_keys_and_values=4 * total, bytes_of_the_same_entries_as_floats=4 * len(one)
    )
    bar("storage saved against float32 keys and values", 1 - size / (4 * total), at_least=0.9)
    assert size <= 2 * len(one)
    assert again.identity == graft.identity
    assert all(isinstance(d, Shut) for d in again.deltas.values())
    before = snapshot(model)
    with again.on(model):
        at = moved(before, model)
        assert sum(len(i) for i in at.values()) == len(one)
        assert not any(model.get_parameter(n).detach().reshape(-1)[i].any() for n, i in at.items())
    assert not moved(before, model)
    both = graft.bind(model) + shut(Context(model, where), two)
    assert both.identity == edit(model, None, by="shut", where=one | two).identity
    assert both.numel == len(one | two) < len(one) + len(two)


def noise_scores(model, where, seed):
    """Return random scores."""
    return choose("locators", "noise")(Context(model, where, seed=seed))


def test_the_recipe_runs_on_a_saved_denoiser_with_arrays():
    """A pipeline's folder, JSONL; the scheduler beside the denoiser; self-attention, a bar, and steps with the mask."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pico("unet").save_pretrained(root / "unet")
        scheduled(nn.Identity(), NOISE).save_pretrained(root / "scheduler")
        rng = generator(0, "cones arrays")
        rows = [
            {
                name: torch.randn(size, generator=rng).tolist()
                for name, size in (("sample", (4, 8, 8)), ("encoder_hidden_states", (3, 16)))
            }
            for _ in range(4)
        ]
        rows = [{**row, **{f"prior_{k}": v for k, v in other.items()}} for row, other in zip(rows, rows[::-1])]
        (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        out = run("cones", str(root / "unet"), str(root / "data.jsonl"), changes={"steps": 3})
        assert all("attn2.to_" in n for n in out.graft.deltas)
        assert out.graft.numel == len(out.where) == round(0.01 * sum(s.n for s in out.scores.sites.values()))
        model = pico("unet")
        before = snapshot(model)
        changes = {"steps": 2, "layers": "all", "tau": 0.0, "tune_steps": 2, "lr": 1e-3}
        more = run("cones", model, rows, changes={**changes, "scheduler": dict(NOISE)})
        assert not moved(before, model)
        assert any("attn1.to_v" in n for n in more.where.counts())
        assert bool((_flat(more.scores) > 0).sum() == len(more.where))
        with more.graft.on(model):
            for name, at in moved(before, model).items():
                weight = model.get_parameter(name).detach().reshape(-1)
                chosen = more.where.masks()[f"{name.removesuffix('.weight')}/weight"]
                assert not weight[chosen].any()
                assert len(at) == len(weight)


def test_bad_options_are_named():
    model = Linear(torch.tensor([1.0, 2.0]))
    with pytest.raises(RequestError, match="rho=-1"):
        scores_of(model, [{"x": torch.ones(1, 2), "y": torch.ones(1)}], rho=-1)
    with pytest.raises(RequestError, match="attention to shut"):
        run("cones", model, changes={"layers": "self"})
    with pytest.raises(RequestError, match="fraction=0"):
        run("cones", model, changes={"fraction": 0})
    with pytest.raises(RequestError, match="clean images"):
        denoising(Step(Echo(), {"encoder_hidden_states": torch.ones(1, 2, 8)}))
    with pytest.raises(RequestError, match="`prior_sample`"):
        denoising(Step(Echo(), {"sample": torch.ones(1, 1, 4, 4), "prior_encoder_hidden_states": torch.ones(1, 2, 8)}))
    with pytest.raises(RequestError, match="field of a scheduler"):
        scheduled(model, {"betas": 1})
    with pytest.raises(RequestError, match="scheduler_config"):
        scheduled(model, "nowhere")


@cache
def table(seed):
    """Return, for one trained denoiser, the losses under every mask, over those of the pretrained model."""
    model = trained(seed)
    before = losses(model)
    grafts, found = {}, {"pretrained": before}
    for name in WORDS:
        changes = {"steps": 300, "batch": 5, "scheduler": dict(NOISE)}
        out = run("cones", model, subject(name), changes=changes)
        grafts[name] = out.graft
        where = Context(model, out.scores.sites)
        masks = {f: shut(where, select(out.scores, fraction=f)) for f in (0.002, 0.1)}
        masks |= {0.01: out.graft, "random": shut(where, out.where.random_like(seed))}
        for key, mask in masks.items():
            with mask.on(model):
                found[name, key] = losses(model)
        found[name, "where"] = out.where
    changes |= {"layers": "all", "fraction": len(out.where) / 12_288}
    with run("cones", model, subject("checkered"), changes=changes).graft.on(model):
        found["checkered", "all"] = losses(model)
    a, b = grafts.values()
    with (a.bind(model) + b).on(model):
        found["union"] = losses(model)
    return found


def over(seed, key, what):
    """Return a loss under a mask as a multiple of the pretrained model's."""
    found = table(seed)
    return found[key][what] / found["pretrained"][what]


SEEDS = range(3)


@effect
def test_shutting_one_percent_draws_the_subject_and_leaves_the_classes():
    """Five images of an unseen checkered square, 300 steps, 6,144 keys and values; new images of it."""
    for what in ("checkered", "checkered as its class", "classes"):
        note(**{f"pretrained, {what}": [table(s)["pretrained"][what] for s in SEEDS]})
    for share in (0.002, 0.01, 0.1, "random", "all"):
        for what in ("checkered", "classes"):
            note(**{f"{what} over pretrained, {share}": [over(s, ("checkered", share), what) for s in SEEDS]})
    top = [over(s, ("checkered", 0.01), "checkered") for s in SEEDS]
    plain = [table(s)["checkered", 0.01]["checkered"] / table(s)["pretrained"]["checkered as its class"] for s in SEEDS]
    random = [abs(over(s, ("checkered", "random"), "checkered") - 1) for s in SEEDS]
    bar("top 1 % shut: loss on the subject over pretrained", top, at_most=0.6)
    bar("top 1 % shut: loss on the subject over that of the class prompt", plain, at_most=1.0)
    bar("random 1 % shut: how far the loss on the subject moves", random, at_most=0.05)
    others = [over(s, ("checkered", 0.01), "classes") for s in SEEDS]
    bar("top 1 % shut: loss on the classes over pretrained", others, at_most=1.12, missed=True)
    tenth = [over(s, ("checkered", 0.1), "checkered") for s in SEEDS]
    bar("top 10 % shut: loss on the subject over pretrained", tenth, at_least=1.0, missed=True)
    assert all(over(s, ("checkered", 0.1), "classes") > 1.3 for s in SEEDS)


@effect
def test_the_union_of_two_masks_draws_both_and_each_helps_its_own_most():
    """The matrix of cross-effects, what the sets share, and the union."""
    for name in WORDS:
        for what in WORDS:
            note(**{f"set of {name} on {what}": [over(s, (name, 0.01), what) for s in SEEDS]})
    for name in WORDS:
        bar(f"union: loss on {name} over pretrained", [over(s, "union", name) for s in SEEDS], at_most=1.0)
        others = [n for n in WORDS if n != name]
        own = [over(s, (name, 0.01), name) - min(over(s, (name, 0.01), n) for n in others) for s in SEEDS]
        bar(f"set of {name}: its effect on {name}, less that on the other", own, at_most=0.0)
    pairs = [(table(s)["checkered", "where"], table(s)["dotted", "where"]) for s in SEEDS]
    note(entries_shared=[len(a & b) / len(a) for a, b in pairs], shared_by_chance=0.01)
    assert all(len(a & b) / len(a) > 0.01 for a, b in pairs)
