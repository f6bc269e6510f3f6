"""Striped images for tiny vision models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurograft.core.errors import one_of
from neurograft.core.seeds import generator
from neurograft.worlds._picos import IMAGE

CLASSES = {"orientation": 4, "width": 3, "brightness": 2}


def images(
    task: str = "orientation", *, count: int = 8, batch: int = 32, noise: float = 0.5, shift: float = 0.0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Return batches of noisy stripes, 3 x 16 x 16, labelled by one of their properties.

    Args:
        task: "orientation" (4 classes), "width" of the stripes (3), or "brightness" (2: dark or light ground).
        count: batches.
        batch: images in each.
        noise: standard deviation of pixel noise; the stripes have amplitude 1.
        shift: added to every pixel, for a changed domain.
        seed: names the images.

    Example:
        >>> images(count=1, batch=2)[0]["pixel_values"].shape
        torch.Size([2, 3, 16, 16])
    """
    one_of(task, CLASSES, what="image task")
    rng, found = generator(seed, "images", task), []
    y, x = torch.meshgrid(torch.arange(IMAGE), torch.arange(IMAGE), indexing="ij")
    for _ in range(count):
        turn = torch.randint(4, (batch,), generator=rng)
        wide = torch.randint(3, (batch,), generator=rng)
        light = torch.randint(2, (batch,), generator=rng)
        angle = turn.double() * math.pi / 4
        along = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
        phase = torch.rand(batch, 1, 1, generator=rng) * 2 * math.pi
        period = torch.tensor([3.0, 5.0, 9.0])[wide][:, None, None]
        stripes = (2 * math.pi * along / period + phase).sin() + (light[:, None, None] - 0.5)
        pixels = stripes[:, None].repeat(1, 3, 1, 1).float()
        pixels = pixels + noise * torch.randn(pixels.shape, generator=rng) + shift
        labels = {"orientation": turn, "width": wide, "brightness": light}[task]
        found.append({"pixel_values": pixels, "labels": labels})
    return found
