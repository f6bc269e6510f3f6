"""Exemplars of units, and what of them a describer is shown: inputs, and where in them the unit is active.

Shape letters: n units, k exemplars, T tokens, h x w positions of a feature map, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError


@dataclass(frozen=True)
class Shown:
    """What a unit is described by: its exemplars and where in them it is active.

    Args:
        inputs: pixels, float [k, C, H, W], or tokens, int64 [k, T].
        masks: bool [k, H, W] or [k, T]; padding is never in them.
    """

    inputs: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Exemplified:
    """The exemplars of a site's units.

    Args:
        values: largest activation in each exemplar, strongest first, float [k, n]; -inf where there are fewer.
        examples: which example it is, int64 [k, n]; -1 where there are fewer.
        level: each unit's own quantile over all examples and positions, float [n].
        maps: activations in the exemplars, float [n, k, h, w] or [n, k, T]; -inf where no activation is.
    """

    values: Tensor
    examples: Tensor
    level: Tensor
    maps: Tensor

    def mask(self, unit: int, pixels: tuple[int, int] | None = None) -> Tensor:
        """Return where a unit is above its level in its exemplars, bool [k, h, w], [k, T], or [k, *pixels].

        Where its level is its maximum, which many equal contexts can share, the places at it count; a constant unit
        is nowhere above.

        Args:
            unit: its number.
            pixels: size of the images, to which maps are up-sampled bilinearly before they are cut. Tokens of a square
                image are laid out as a square, without the ones that stand before its patches.

        Raises:
            RequestError: pixels for the tokens of an image that is no square.
        """
        maps = self.maps[unit][self.examples[:, unit] >= 0]
        if pixels is not None:
            maps = _grid(maps, pixels) if maps.dim() == 2 else maps
            maps = F.interpolate(maps[:, None], size=pixels, mode="bilinear", align_corners=False)[:, 0]
        level = self.level[unit]
        above = maps > level
        if not bool(above.any()) and bool((maps.isfinite() & (maps < level)).any()):
            above = maps >= level
        return above

    def shown(self, unit: int, batches: Sequence[Batch]) -> Shown:
        """Return a unit's exemplars and masks as a describer takes them; exemplars without any mask are left out.

        Args:
            unit: its number.
            batches: those the exemplars were taken from.

        Raises:
            RequestError: neither pixels nor tokens, or images of several sizes.
        """
        chosen = [e for e in self.examples[:, unit].tolist() if e >= 0]
        if not chosen:  # an expert that no token was sent to
            return Shown(torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.bool))
        inputs = _inputs(batches, chosen)
        pixels = (inputs.shape[-2], inputs.shape[-1]) if inputs.dim() == 4 else None
        masks = self.mask(unit, pixels)
        if pixels is None:
            masks = F.pad(masks, (0, max(0, inputs.shape[1] - masks.shape[1])))[:, : inputs.shape[1]]
        keep = masks.flatten(1).any(1)
        return Shown(inputs[keep], masks[keep])


def _grid(maps: Tensor, pixels: tuple[int, int]) -> Tensor:
    """Lay the tokens of square images out, [k, T] to [k, g, g]."""
    if pixels[0] != pixels[1]:
        raise RequestError(
            f"tokens of images of {pixels[0]} x {pixels[1]}",
            expected="square images",
            do="bring the images to a square",
        )
    side = math.isqrt(maps.shape[1])
    return maps[:, maps.shape[1] - side * side :].reshape(-1, side, side)


def _inputs(batches: Sequence[Batch], chosen: Sequence[int]) -> Tensor:
    """Return the pixels or tokens of some examples; tokens padded on the right."""
    name = next((n for n in ("pixel_values", "input_ids") if batches and n in batches[0]), None)
    if name is None:
        raise RequestError(
            f"examples of {', '.join(batches[0]) if batches else 'nothing'}",
            expected="pixel_values or input_ids",
            do="give images or texts",
        )
    rows: list[Tensor] = [row for batch in batches for row in batch[name]]
    if name == "input_ids":
        return torch.nn.utils.rnn.pad_sequence([rows[e].cpu() for e in chosen], batch_first=True)
    if len({rows[e].shape for e in chosen}) != 1:
        raise RequestError("images of several sizes", expected="one size", do="bring the images to one size")
    return torch.stack([rows[e].float().cpu() for e in chosen])
