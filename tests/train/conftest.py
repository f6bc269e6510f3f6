"""Selections by hand, and what must hold after every training."""

import math

import pytest
import torch

from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site
from neurograft.worlds.pico import pico, pico_batch

MLP = {
    "model.layers.0.mlp.gate_proj.weight": ("row", [1, 5, 40]),
    "model.layers.0.mlp.up_proj.weight": ("row", [1, 5, 40]),
    "model.layers.1.mlp.down_proj.weight": ("column", [0, 7]),
}


def _pick(model, chosen=None):
    """Return rows, columns or single weights of parameters as a selection: {parameter: (kind, ids)}."""
    sites, ids = {}, {}
    for name, (kind, units) in (MLP if chosen is None else chosen).items():
        shape = tuple(model.get_parameter(name).shape)
        part = Part.entries(name, math.prod(shape))
        if kind != "weight":
            part = Part.rows(name, shape) if kind == "row" else Part.columns(name, shape)
        sites[name] = Site(name, kind, part.n, (part,))
        ids[name] = units
    return Selection.of(sites, ids)


@pytest.fixture
def pick():
    return _pick


@pytest.fixture
def llama():
    return pico("llama", seed=1)


@pytest.fixture
def examples():
    """Sixteen examples of one length for a causal model; the first tokens carry no label."""

    def make(model, n=16, length=8):
        made = []
        for seed in range(n):
            one = {k: v[0] for k, v in pico_batch(model, batch=1, length=length, seed=seed).items()}
            one["labels"] = one["labels"].clone()
            one["labels"][: 1 + seed % 4] = -100
            made.append(one)
        return made

    return make


class _Unmoved:
    """Compares a model with what it was."""

    def __init__(self, model):
        self.model = model
        self.keys = list(model.state_dict())
        self.values = {k: v.clone() for k, v in model.state_dict().items()}
        self.flags = [(p.requires_grad, p.grad) for p in model.parameters()]
        self.modes = [m.training for m in model.modules()]
        self.inside = [
            {k: repr(v) for k, v in vars(m).items() if not isinstance(v, dict) or k.endswith("hooks")}
            for m in model.modules()
        ]
        self.config = repr(getattr(model, "config", None))
        self.random = torch.random.get_rng_state()

    def check(self, allowed=()):
        now = self.model.state_dict()
        assert list(now) == self.keys
        changed = [k for k in now if now[k].dtype != self.values[k].dtype or not torch.equal(now[k], self.values[k])]
        assert not set(changed) - set(allowed), changed
        assert [m.training for m in self.model.modules()] == self.modes
        assert [(p.requires_grad, p.grad) for p in self.model.parameters()] == self.flags
        inside = [
            {k: repr(v) for k, v in vars(m).items() if not isinstance(v, dict) or k.endswith("hooks")}
            for m in self.model.modules()
        ]
        assert inside == self.inside
        assert repr(getattr(self.model, "config", None)) == self.config
        assert torch.equal(torch.random.get_rng_state(), self.random)


@pytest.fixture
def unmoved():
    return _Unmoved


def _only(model, before, selection):
    """Check that no entry of a live model but the selected ones differs from before."""
    for name, value in before.items():
        differs = model.state_dict()[name] != value
        if name in selection.ids and len(selection.ids[name]):
            rows = selection.sites[name].kind == "row"
            other = torch.ones(differs.shape[0 if rows else 1], dtype=torch.bool)
            other[selection.ids[name]] = False
            assert not (differs[other] if rows else differs[:, other]).any(), name
            assert differs.any(), f"{name} did not move"
        else:
            assert not differs.any(), name


@pytest.fixture
def only():
    return _only
