"""Points for tiny perceptrons: classes that a hidden random network tells apart."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.errors import one_of
from neurograft.core.seeds import generator

FEATURES, CLASSES = 16, 4
TASKS = ("a", "b")


def vectors(task: str = "a", *, count: int = 8, batch: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return batches of 16 features and one of 4 labels.

    Both tasks read the same 8 hidden directions of the input, so that what is learned on "a" serves "b".

    Args:
        task: "a" or "b".
        count: batches.
        batch: rows.
        seed: names the points; the hidden network is always the same.

    Example:
        >>> sorted(vectors(count=1)[0])
        ['features', 'labels']
    """
    one_of(task, TASKS, what="vector task")
    directions = torch.randn(FEATURES, 8, generator=generator(0, "vectors", "directions"))
    readout = torch.randn(8, CLASSES, generator=generator(0, "vectors", task))
    rng, found = generator(seed, "vectors", "points", task), []
    for _ in range(count):
        x = torch.randn(batch, FEATURES, generator=rng)
        hidden = (x @ directions).relu()
        hidden = hidden - hidden.mean(-1, keepdim=True)  # else one class takes nearly all points
        found.append({"features": x, "labels": (hidden @ readout).argmax(-1)})
    return found
