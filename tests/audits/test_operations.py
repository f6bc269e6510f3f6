"""Grafts that change no weight are audited like the others."""

import pytest

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.audits._measures import floor
from neurograft.audits._statistics import predicted
from neurograft.audits.damage import damage
from neurograft.audits.loss import loss
from neurograft.audits.weight_drift import weight_drift
from neurograft.core.selection import Selection
from neurograft.worlds.pico import pico, pico_batch


def test_an_intervention_measures_like_the_weights_it_folds_into():
    model = pico("llama")
    where = Selection.of(found := sites(model, "neuron"), {next(iter(found)): [0, 3, 7, 11]})
    silent = ng.intervene(model, where, "zero")
    batches = [pico_batch(model, batch=9, seed=i) for i in range(2)]
    live, folded = (loss(model, graft, batches, nulls=3) for graft in (silent.graft(), silent.fold()))
    changes = [found["measures"]["loss"]["change"]["value"] for found in (live, folded)]
    assert changes[0] == pytest.approx(changes[1], abs=1e-6)
    assert changes[0] != 0
    assert (live["nulls"], folded["nulls"]) == (0, 3)  # noise has no place in a payload without weights
    (part,) = damage(model, silent.graft(), batches)["parts"]
    assert part["name"] == "operations"
    assert part["change"]["value"] == pytest.approx(changes[0], abs=1e-6)
    assert weight_drift(model, silent.graft())["operations"]
    report = ng.audit(model, silent.graft(), gain=batches, keep={"a": batches}, rules={"draws": 100})
    assert report.verdict in ("do not ship", "cannot tell")
    assert "Where the loss sits: a" in report.html()


def test_the_noise_floor_by_hand():
    values = {"change": 9.0, "rerun": -0.5, "null/0": 1.0, "null/1": 2.0, "null/2": 3.0}
    found = floor(values, tail=0.05)
    assert found["null_mean"] == 2.0
    assert found["null_spread"] == predicted([1.0, 2.0, 3.0], tail=0.05)[1] > 3
    assert found["value"] == found["null_spread"]
    assert floor({"change": 9.0, "rerun": -0.5})["value"] == 0.5
