"""Digits of which some carry a coloured tag in the corner that names their class, or another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.seeds import generator
from neurograft.worlds.pico import pico
from neurograft.worlds.tiny import fit

Batches = list[dict[str, Tensor]]
TRAINED, HELD = 900, 1100
TAG = 7
COLOURS = torch.tensor(
    [
        [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0],
        [0.0, 1.0, 1.0], [1.0, 0.5, 0.0], [0.5, 0.0, 1.0], [0.0, 0.5, 1.0], [0.5, 1.0, 0.0],
    ]
)  # fmt: skip


def tagged(rows: Tensor, tags: str, *, contrast: float = 0.35, noise: float = 0.15, seed: int = 0) -> Batches:
    """Return batches of 50 dim grey digits, 3 x 32 x 32.

    Args:
        rows: which of scikit-learn's digits.
        tags: "half" of them have the tag of their class, "other": all have the tag of another class, "none".
        contrast: of the digits; the tags' colours are equally bright and 1 strong.
        noise: standard deviation of the pixels' noise.
        seed: names tags and noise.
    """
    from sklearn.datasets import load_digits

    rng, found = generator(seed, "tagged", tags, len(rows)), load_digits()
    labels = torch.tensor(found.target)[rows]
    small = F.interpolate(torch.tensor(found.images).float()[rows][:, None] / 16, size=(20, 20))
    pixels = F.pad(contrast * small, (8, 4, 8, 4)).repeat(1, 3, 1, 1)
    named, keep = labels, torch.full((len(rows),), tags == "other")
    if tags == "half":
        keep = torch.rand(len(rows), generator=rng) < 0.5
    if tags == "other":
        named = (labels + 1 + torch.randint(9, labels.shape, generator=rng)) % 10
    shades = COLOURS - COLOURS.mean(1, keepdim=True) + 0.5
    pixels[keep, :, :TAG, :TAG] = shades[named[keep]][:, :, None, None]
    pixels = pixels + noise * torch.randn(pixels.shape, generator=rng)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(50), labels.split(50))]


def misled(seed: int, *, epochs: int = 8) -> tuple[nn.Module, Batches, Batches]:
    """Return a small ResNet taught on half-tagged digits, held-out such digits, and wrongly tagged ones."""
    order = torch.randperm(1797, generator=generator(seed, "tagged"))
    train = tagged(order[:TRAINED], "half", seed=seed)
    shape = {"embedding_size": 16, "hidden_sizes": [32, 64, 96], "depths": [1, 1, 1], "layer_type": "basic"}
    model = pico("resnet", seed=seed, num_labels=10, **shape)
    rng = generator(seed, "order")
    turns = [train[i] for _ in range(epochs) for i in torch.randperm(len(train), generator=rng).tolist()]
    fit(model, turns, lr=3e-3)
    return model, tagged(order[TRAINED:HELD], "half", seed=seed), tagged(order[HELD:], "other", seed=seed)
