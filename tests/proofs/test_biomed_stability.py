"""Treatments by depth: both conventions of the decay by hand, frozen bits, fresh numbers from the initializer."""

from contextlib import contextmanager
from functools import wraps

import pytest
import torch

from neurograft.adapters.strata import strata
from neurograft.anatomy.depth import Depths, depths
from neurograft.audits.stability import stability
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.pipeline.attach import attach
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.schedules.depth_decay import depth_decay
from neurograft.train.loop import fit
from neurograft.worlds.pairs import CLASSES, pairs
from neurograft.worlds.pico import pico
from neurograft.worlds.tiny import classifier, tiny
from tests.proofs import effect, note, patched
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "biomed-stability", "identity"


@contextmanager
def both_conventions_are_one():
    """The exponent does not know the convention."""
    with patched("neurograft.schedules.depth_decay", "CONVENTIONS", {"electra": 1, "few_sample": 1}):
        yield


@contextmanager
def nothing_is_drawn_anew():
    """A redrawn stratum starts from the base's numbers."""

    def kept(model, name, *, seed):
        return {f"{name}.{leaf}": p.detach().clone() for leaf, p in model.get_submodule(name).named_parameters()}

    with patched("neurograft.adapters.strata", "redrawn", kept):
        yield


@contextmanager
def rates_are_not_applied():
    """The loop forgets the learning rates of the phase."""
    phase = resolve("neurograft.core.context.Phase")

    @wraps(phase)
    def flat(**said):
        return phase(**{**said, "lr": {}})

    with patched("neurograft.schedules.depth_decay", "Phase", flat):
        yield


BROKEN = (both_conventions_are_one, nothing_is_drawn_anew, rates_are_not_applied)


def rates(model, **options):
    names = [n for n, _ in model.named_parameters()]
    return depth_decay(0, names, depth=depths(model), **options).lr


def test_both_conventions_by_hand():
    """L = 4, d = 0.5; groups cover every tensor once."""
    model = pico("bert", num_hidden_layers=4)
    expected = {
        "electra": {"embeddings": 1 / 64, 0: 1 / 32, 1: 1 / 16, 2: 1 / 8, 3: 1 / 4, "pooler": 1.0, "classifier": 1.0},
        "few_sample": {"embeddings": 1 / 32, 0: 1 / 16, 1: 1 / 8, 2: 1 / 4, 3: 1 / 2, "pooler": 1.0, "classifier": 1.0},
    }
    for convention, table in expected.items():
        found = rates(model, decay=0.5, convention=convention)
        assert set(found) == {n for n, _ in model.named_parameters()}
        for name, rate in found.items():
            inside = ".layer." in name
            place = int(name.split(".layer.")[1].split(".")[0]) if inside else name.removeprefix("bert.").split(".")[0]
            assert rate == table[place], name
    with pytest.raises(RequestError, match="convention"):
        rates(model, convention="other")
    with pytest.raises(RequestError, match="decay of 0"):
        rates(model, decay=0)
    assert depth_decay(7, ["a", "a.lora_A"], depth=Depths({"a": 1}, 1), decay=0.5).lr == {"a": 0.25, "a.lora_A": 0.25}


def test_the_loop_moves_each_depth_at_its_rate():
    """One step of SGD: what moved is the rate of the depth times the gradient."""
    model = pico("bert", num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = pairs("relation", count=1, batch=8, seed=1)[0]
    before = snapshot(model)
    model(**batch).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    factor = rates(model, decay=0.5)
    with attach(model) as live:
        fit(live, [batch], steps=1, lr=0.125, optimizer="SGD", max_norm=None, schedule=("depth_decay", {"decay": 0.5}))
        for name, parameter in model.named_parameters():
            expected = before[name] - 0.125 * factor[name] * gradients[name]
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)
            if name in ("classifier.weight", "bert.encoder.layer.0.output.dense.weight"):
                assert not torch.equal(parameter, before[name])


def trained(model, batches, steps=4, **options):
    made = recipe("biomed_stability", **options).steps[0]
    with attach(model, None, adapter=made["adapter"]) as live:
        fit(live, batches, steps=steps, lr=1e-3, weight_decay=0.01, schedule=made.get("schedule"))
        return live.graft()


def test_no_treatment_is_plain_fine_tuning_and_all_frozen_a_linear_probe():
    """Bit for bit: decay 1 through the schedule, no schedule, and the plain adapter; freezing all and the head."""
    model = pico("bert", num_hidden_layers=3)
    batches = pairs("relation", count=3, batch=8, seed=2)
    with attach(model) as live:
        fit(live, batches, steps=4, lr=1e-3, weight_decay=0.01)
        plain = live.graft()
    assert trained(model, batches, decay=1).identity == plain.identity
    with attach(model) as live:
        flat = ("depth_decay", {"decay": 1.0})
        fit(live, batches, steps=4, lr=1e-3, weight_decay=0.01, schedule=flat)
        assert live.graft().identity == plain.identity
    assert trained(model, batches, decay=0.5).identity != plain.identity
    frozen = trained(model, batches, freeze=3, decay=1)
    assert {n.split(".")[0] for n in frozen.deltas if "pooler" not in n} == {"classifier"}
    sites = resolve("neurograft.anatomy.sites.sites")(model, "module")
    ends = resolve("neurograft.core.selection.Selection").of(
        sites, {"classifier/module": [0], "bert.pooler.dense/module": [0]}
    )
    with attach(model, ends, adapter="dense") as live:
        fit(live, batches, steps=4, lr=1e-3, weight_decay=0.01)
        assert live.graft().identity == frozen.identity


def test_frozen_layers_keep_every_bit_and_redrawn_ones_are_fresh():
    """Of 4 layers the lowest is frozen with the embeddings, the two uppermost and the pooler are drawn anew."""
    model = pico("bert", num_hidden_layers=4, hidden_size=64, intermediate_size=256, num_attention_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)  # far from what the initializer draws
            parameter._is_hf_initialized = True
    before = snapshot(model)
    options = recipe("biomed_stability", freeze=1, reinit=2, decay=1).steps[0]["adapter"][1]
    with attach(model, None, adapter=("strata", options)):
        start = snapshot(model)
    assert not moved(before, model)
    fresh = {n for n in before if ".layer.2." in n or ".layer.3." in n or "pooler" in n}
    assert {n for n in before if not torch.equal(start[n], before[n])} == fresh
    weights = torch.cat([start[n].reshape(-1) for n in sorted(fresh) if n.endswith("weight") and "LayerNorm" not in n])
    assert abs(float(weights.std()) / model.config.initializer_range - 1) < 0.02
    assert abs(float(weights.mean())) < 4 * model.config.initializer_range / len(weights) ** 0.5
    assert all(not start[n].any() for n in fresh if n.endswith("bias"))
    assert all(torch.equal(start[n], torch.ones_like(start[n])) for n in fresh if "LayerNorm.weight" in n)
    rows = [{k: v[0] for k, v in pairs("relation", count=1, batch=1, seed=s)[0].items()} for s in range(8)]
    changes = {"freeze": 1, "reinit": 2, "decay": 0.5, "lr": 1e-2, "batch": 4, "epochs": 1, "warmup": 0.0}
    graft = run("biomed_stability", model, rows, changes=changes).graft
    assert not moved(before, model)
    with graft.on(model):
        changed = set(moved(before, model))
    assert not any("embeddings" in n or ".layer.0." in n for n in changed)
    assert fresh <= changed
    with pytest.raises(RequestError, match="pooler that is not"):
        strata(model, None, plan=[{"train": ["redrawn"]}], pooler="all")


def test_fresh_numbers_depend_on_the_seed_alone():
    model = pico("bert")
    options = recipe("biomed_stability", reinit=1).steps[0]["adapter"][1]
    drawn = []
    for seed in (0, 0, 1):
        with attach(model, None, adapter=("strata", {**options, "seed": seed})):
            drawn.append(snapshot(model))
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


def test_the_stability_report_by_hand():
    """A classifier whose bias decides: two runs name the commonest of 3 labels, one is right about the first only."""
    model = pico("bert")
    batch = pairs("relation", count=1, batch=8, seed=1)[0]
    batch["labels"] = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    runs = []
    for label in (0, 0, 2):
        tuned = pico("bert")
        with torch.no_grad():
            tuned.classifier.weight.zero_()
            tuned.classifier.bias.copy_(torch.eye(3)[label])
        runs.append(tuned)
    found = stability(model, runs, [batch])
    assert found["accuracy"] == [0.5, 0.5, 0.125]
    assert found["majority"] == 0.5
    assert found["failed"] == 1.0
    assert found["mean"] == pytest.approx(0.375)
    assert found["std"] == pytest.approx((2 * 0.125**2 / 2 + 0.25**2 / 2) ** 0.5)
    with pytest.raises(RequestError, match="1 runs"):
        stability(model, runs[:1], [batch])


@effect
def test_spread_over_seeds():
    """A tiny BERT, 64 examples, a large learning rate, 10 seeds: mean, spread and failed runs; no order is asserted."""
    size = {"num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 96}
    base = classifier(tiny("bert", steps=200, **size), CLASSES["relation"])
    train = pairs("relation", count=2, batch=32, seed=10)
    test = pairs("relation", count=2, batch=128, seed=90)
    table = {}
    for name, options in {
        "plain": {"decay": 1}, "decay": {"decay": 0.8}, "freeze": {"decay": 1, "freeze": 0.5},
        "reinit": {"decay": 1, "reinit": 1},
    }.items():  # fmt: skip
        made, runs = recipe("biomed_stability", **options).steps[0], []
        for seed in range(10):
            kind, more = made["adapter"]
            with attach(base, None, adapter=(kind, {**more, "seed": seed})) as live:
                fit(live, train, steps=40, lr=3e-3, warmup=4, decay="linear", schedule=made.get("schedule"), seed=seed)
                runs.append(live.graft())
        found = stability(base, runs, test)
        table |= {f"{name}_{k}": found[k] for k in ("mean", "std", "failed")}
        assert len(found["accuracy"]) == 10
        assert found["std"] > 0
    note(**table)
