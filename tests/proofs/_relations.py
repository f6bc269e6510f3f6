"""Tiny BERTs that are asked how the numbers of a pair are related."""

from __future__ import annotations

from torch import Tensor, nn

from neurograft.worlds.pairs import CLASSES, pairs
from neurograft.worlds.tiny import classifier, tiny
from tests.proofs._tools import rows_in

Batches = list[dict[str, Tensor]]


def pair_rows(count: int = 16) -> list[dict[str, Tensor]]:
    """Return so many pairs as rows."""
    return rows_in(pairs("relation", count=1, batch=count, seed=3)[0])


def reader(seed: int, *, layers: int) -> tuple[nn.Module, Batches, Batches]:
    """Return an encoder with a head that knows nothing yet, batches to train on and batches held out."""
    shape = {"num_hidden_layers": layers, "hidden_size": 48, "intermediate_size": 96}
    model = classifier(tiny("bert", seed=seed, steps=200, **shape), CLASSES["relation"], seed=seed)
    return model, pairs("relation", count=40, batch=32, seed=10 + seed), pairs("relation", count=4, batch=128, seed=90)
