"""Sets of small pictures that share one thing, where it is in them, and what it is called."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator

KINDS = ("stroke", "square", "disc", "stripes", "ground")
COLOURS = {
    "red": (1.0, 0.0, 0.0), "green": (0.0, 0.8, 0.0), "blue": (0.0, 0.2, 1.0), "yellow": (1.0, 0.9, 0.0),
    "white": (1.0, 1.0, 1.0),
}  # fmt: skip
PLACES = {"in the corner": None, "in the middle": (0.5, 0.5), "at the left": (0.5, 0.2), "at the right": (0.5, 0.8)}
CORNERS = ((0.15, 0.15), (0.15, 0.85), (0.85, 0.15), (0.85, 0.85))


def scenes(
    *, count: int = 300, k: int = 6, size: int = 32, channels: int = 3, noise: float = 0.3, seed: int = 0
) -> list[dict[str, Any]]:
    """Return sets of k pictures that have one described thing in common; something else is in every picture too.

    A thing is a stroke, a square, a disc, stripes or bare ground, of one colour or of many ("coloured"), anywhere or
    in one place; what varies within a set is not described. Masks are coarse, as those of feature maps are.

    Args:
        count: sets.
        k: pictures in each.
        size: pixels of a side, at least 8.
        channels: of a pixel; other than 3 get one mixture of red, green and blue each.
        noise: largest standard deviation of the pixels' noise, drawn anew for each set; things are about 1 bright.
        seed: names the scenes.

    Returns:
        Dicts of `images` float [k, channels, size, size], `masks` bool [k, size, size], `description`.

    Raises:
        RequestError: a size below 8, or no sets.

    Example:
        >>> one = scenes(count=1, k=2, seed=3)[0]
        >>> one["images"].shape, one["masks"].shape, one["description"]
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 32, 32]), 'yellow disc')
    """
    if size < 8 or count < 1 or k < 1:
        raise RequestError(f"count={count}, k={k}, size={size}", expected="at least 1, 1 and 8", do="raise it")
    rng, found = generator(seed, "scenes"), []
    mix = torch.eye(3) if channels == 3 else torch.rand(channels, 3, generator=rng) / 1.5
    for _ in range(count):
        kind, colour, blur = _pick(KINDS, rng), _pick((*COLOURS, "coloured"), rng), _draw(0.0, noise, rng)
        place = _pick((*PLACES, ""), rng)
        if kind == "ground":
            colour, place = "", ""
        pictures = [_picture(kind, colour, place, size, blur, rng) for _ in range(k)]
        images = torch.einsum("cd,kdhw->kchw", mix, torch.stack([p for p, _ in pictures]))
        masks = torch.stack([_coarse(m, rng) for _, m in pictures])
        found.append({"images": images, "masks": masks, "description": " ".join(filter(None, (colour, kind, place)))})
    return found


def _pick(names: tuple[str, ...], rng: torch.Generator) -> str:
    return names[int(torch.randint(len(names), (), generator=rng))]


def _draw(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _picture(
    kind: str, colour: str, place: str, size: int, noise: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return one picture [3, H, W] and where the described thing is in it, float [H, W]."""
    image = _draw(0.0, 0.4, rng) * torch.ones(3, size, size)
    other = _pick(KINDS[:4], rng)
    behind = _shape(other, _somewhere("", rng), size, rng)
    image = _painted(image, behind, _pick(tuple(COLOURS), rng))
    if kind == "ground":
        where = 1 - behind
        cut = torch.zeros(size, size)
        y, x = (int(torch.randint(size // 2 + 1, (), generator=rng)) for _ in range(2))
        cut[y : y + size // 2, x : x + size // 2] = 1
        where = where * cut if bool((where * cut).any()) else where
    else:
        where = _shape(kind, _somewhere(place, rng), size, rng)
        name = _pick(tuple(COLOURS)[:4], rng) if colour == "coloured" else colour
        image = _painted(image, where, name)
    return image + noise * torch.randn(image.shape, generator=rng), where


def _painted(image: Tensor, where: Tensor, colour: str) -> Tensor:
    return image * (1 - where) + torch.tensor(COLOURS[colour])[:, None, None] * where


def _somewhere(place: str, rng: torch.Generator) -> tuple[float, float]:
    if place == "in the corner":
        return CORNERS[int(torch.randint(4, (), generator=rng))]
    centre = PLACES.get(place)
    if centre is None:
        return _draw(0.15, 0.85, rng), _draw(0.15, 0.85, rng)
    return centre[0] + _draw(-0.1, 0.1, rng), centre[1] + _draw(-0.05, 0.05, rng)


def _shape(kind: str, centre: tuple[float, float], size: int, rng: torch.Generator) -> Tensor:
    """Return where a thing covers the picture, float [H, W]."""
    along = (torch.arange(size) + 0.5) / size
    y, x = along[:, None] - centre[0], along[None, :] - centre[1]
    half = _draw(0.09, 0.2, rng)
    if kind == "square":
        return ((y.abs() < half) & (x.abs() < half)).float()
    if kind == "disc":
        return (y.square() + x.square() < half * half).float()
    angle = torch.tensor(_draw(0.0, 3.1416, rng))
    u, v = y * angle.cos() + x * angle.sin(), x * angle.cos() - y * angle.sin()
    if kind == "stripes":
        period = _draw(0.1, 0.16, rng)
        return ((u.abs() < 1.3 * half) & (v.abs() < 1.3 * half) & ((u / period) % 1 < 0.5)).float()
    bent = v - _draw(-2.0, 2.0, rng) * u.square()  # an arc
    return ((bent.abs() < _draw(0.03, 0.06, rng)) & (u.abs() < 1.6 * half)).float()


def _coarse(where: Tensor, rng: torch.Generator) -> Tensor:
    """Return a mask as a unit's feature map would give it: a part or an edge of the thing, on a grid, cut."""
    size, part = len(where), where
    how = _draw(0.0, 3.0, rng)
    if how > 2:  # its edges
        grown, shrunk = (F.max_pool2d(s * where[None, None], 3, 1, 1)[0, 0] * s for s in (1.0, -1.0))
        part = grown - shrunk
    if how > 1:  # one side of it
        angle, along = torch.tensor(_draw(0.0, 6.2832, rng)), torch.arange(size) / size
        side = along[:, None] * angle.cos() + along[None] * angle.sin()
        middle = (side * part).sum() / part.sum().clamp(min=1e-6)
        part = part * (side >= middle)
    part = part if bool(part.any()) else where
    cells = (4, 8, size)[int(torch.randint(3, (), generator=rng))]
    small = F.adaptive_avg_pool2d(part[None, None], min(cells, size))
    wide = F.interpolate(small, size=where.shape, mode="bilinear", align_corners=False)[0, 0]
    return wide > _draw(0.3, 0.8, rng) * wide.max()
