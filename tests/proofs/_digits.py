"""scikit-learn's digits as images for tiny vision transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.seeds import generator
from neurograft.worlds.tiny import fit, tiny

Batches = list[dict[str, Tensor]]
TRAINED = 1200


@cache
def order(seed: int) -> Tensor:
    """Return an order of the 1,797 digits; the first 1,200 are for training."""
    return torch.randperm(1797, generator=generator(seed, "digits"))


def digits(
    rows: Tensor, *, classes: tuple[int, ...] = tuple(range(10)), turn: Callable[[Tensor], Tensor] | None = None
) -> Batches:
    """Return batches of 50 images 3 x 16 x 16 of some classes, numbered anew from 0.

    Args:
        rows: which of the digits.
        classes: those kept.
        turn: applied to the images [B, 1, 8, 8] first.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    target = torch.tensor(found.target)[rows]
    keep = torch.isin(target, torch.tensor(classes))
    pixels = torch.tensor(found.images).float()[rows][keep][:, None] / 8 - 1
    pixels = F.interpolate(pixels if turn is None else turn(pixels), size=(16, 16)).repeat(1, 3, 1, 1)
    labels = torch.searchsorted(torch.tensor(classes), target[keep])
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(50), labels.split(50))]


def reader(seed: int, train: Batches, *, labels: int, epochs: int = 5) -> nn.Module:
    """Return a ViT of two layers that was taught to read digits."""
    model = tiny("vit", steps=1, seed=seed, num_labels=labels, num_hidden_layers=2)
    return fit(model, epochs * train, lr=3e-3)
