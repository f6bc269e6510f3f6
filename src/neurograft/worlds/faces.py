"""Scenes with a hidden face: parts with a texture each in one of two ways, in clutter of the same statistics.

Which way a part is in is an attribute, the combination of all of them an identity. Nothing but the textures tells a
face from its surroundings, so only who has learned them can find it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator

SIDE, FACE, GRAIN = 32, 12, 2


@dataclass(frozen=True)
class Scenes:
    """Labelled scenes.

    Args:
        pixel_values: float32 [N, 3, 32, 32].
        labels: attributes of the first face, 0 or 1, int64 [N, A].
        identity: of the first face, sum of labels * 2^k, int64 [N].
        boxes: top, left, bottom, right of every face in pixels, the far ends outside; int64 [N, faces, 4].
    """

    pixel_values: Tensor
    labels: Tensor
    identity: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.pixel_values)

    def batches(self, size: int = 64) -> list[dict[str, Tensor]]:
        """Return the scenes as batches, without the boxes."""
        parts = [self.pixel_values.split(size), self.labels.split(size), self.identity.split(size)]
        return [{"pixel_values": x, "labels": y, "identity": who} for x, y, who in zip(*parts)]

    def inside(self, places: Tensor) -> Tensor:
        """Return whether a place of each scene, pixels (down, right) [N, 2], lies in one of its faces, bool [N]."""
        at = places[:, None]
        return ((at >= self.boxes[..., :2]) & (at < self.boxes[..., 2:])).all(-1).any(-1)

    def hits(self, scene: int, places: Tensor) -> Tensor:
        """Return which places [K, 2] of one scene lie in which of its faces, bool [K, faces]."""
        box, at = self.boxes[scene], places[:, None]
        return ((at >= box[:, :2]) & (at < box[:, 2:])).all(-1)


def faces(
    count: int,
    *,
    attributes: int = 6,
    identities: Sequence[int] | None = None,
    together: int = 1,
    gap: int = 4,
    noise: float = 0.2,
    world: int = 0,
    seed: int = 0,
) -> Scenes:
    """Return scenes of 32 x 32 pixels, each with a face of 12 x 12 somewhere.

    Face and ground are made of grains of 2 x 2 pixels, each colour +1 or -1 at random; a part's texture is the same
    in all scenes of a world, and as a negative where the attribute is there.

    Args:
        count: scenes.
        attributes: 2, 4 or 6 parts, in two rows.
        identities: those that appear; all 2^attributes if None.
        together: faces in a scene, 1 or 2.
        gap: pixels between two of them, at most 8.
        noise: standard deviation of noise on every pixel.
        world: names the textures.
        seed: names the scenes.

    Raises:
        RequestError: other numbers of attributes or faces.

    Example:
        >>> made = faces(3)
        >>> made.pixel_values.shape, made.labels.shape, made.boxes.shape
        (torch.Size([3, 3, 32, 32]), torch.Size([3, 6]), torch.Size([3, 1, 4]))
    """
    if attributes not in (2, 4, 6) or together not in (1, 2) or not 0 <= gap <= SIDE - 2 * FACE:
        raise RequestError(
            f"{together} faces of {attributes} parts, {gap} pixels apart",
            expected="1 or 2 faces of 2, 4 or 6 parts, at most 8 apart",
            do="choose among them",
        )
    rng = generator(seed, "faces", world)
    known = torch.arange(2**attributes) if identities is None else torch.tensor(list(identities))
    who = known[torch.randint(len(known), (count, together), generator=rng)]
    labels = (who[..., None] >> torch.arange(attributes)) & 1
    pixels = _ground(count, rng)
    corners = _places(count, together, gap, rng)
    textures = _textures(attributes, world)
    for i in range(count):
        for (top, left), label in zip(corners[i].tolist(), labels[i]):
            pixels[i, :, top : top + FACE, left : left + FACE] = _face(textures, label)
    pixels += noise * torch.randn(pixels.shape, generator=rng)
    return Scenes(pixels, labels[:, 0], who[:, 0], torch.cat([corners, corners + FACE], -1))


def _textures(attributes: int, world: int) -> Tensor:
    """Return both textures of every part, [A, 2, 3, 6, 24 / A]."""
    shape = (attributes, 3, FACE // 2 // GRAIN, 2 * FACE // attributes // GRAIN)
    one = _grains(shape, generator(world, "faces", "textures", attributes))
    return torch.stack([one, -one], 1)


def _face(textures: Tensor, label: Tensor) -> Tensor:
    parts = textures[torch.arange(len(label)), label]
    return torch.cat([torch.cat(list(row), -1) for row in parts.chunk(2)], -2)


def _ground(count: int, rng: torch.Generator) -> Tensor:
    side = SIDE // GRAIN + 1
    wide = _grains((count, 3, side, side), rng)
    shift = torch.randint(GRAIN, (count, 2), generator=rng).tolist()
    return torch.stack([x[:, a : a + SIDE, b : b + SIDE] for x, (a, b) in zip(wide, shift)])


def _grains(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    coarse = torch.randint(2, shape, generator=rng).float() * 2 - 1
    return coarse.repeat_interleave(GRAIN, -1).repeat_interleave(GRAIN, -2)


def _places(count: int, together: int, gap: int, rng: torch.Generator) -> Tensor:
    """Return the top left corners, int64 [count, together, 2], drawn again where two faces are too near."""
    found = torch.randint(SIDE - FACE + 1, (count, together, 2), generator=rng)
    while together == 2:
        near = (found[:, 0] - found[:, 1]).abs().amax(-1) < FACE + gap
        if not bool(near.any()):
            break
        found[near] = torch.randint(SIDE - FACE + 1, (int(near.sum()), 2, 2), generator=rng)
    return found
