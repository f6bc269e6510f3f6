"""From response maps to places: peaks of the density, or what lies above a threshold."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of

WAYS = ("peaks", "threshold")
CHUNK = 1 << 24


@method(
    paper="lnet-anet",
    departs="How dense and how far from denser places a peak must be is ours (share, apart); so is the smoothing.",
)
def localise(
    response: Tensor, *, by: str = "peaks", share: float = 0.4, apart: float = 2.0, smooth: int = 3
) -> list[Tensor]:
    """Return the boxes of each image where its response is high, the densest first.

    "peaks": with rho(x) the smoothed response and delta(x) the distance to the nearest place of higher rho (of equal
    ones the earlier counts as higher; the densest has the greatest distance there is), every cell with
    rho >= share * max rho and delta >= apart. "threshold": one box around all cells whose response is at least
    share * max.

    Args:
        response: [B, h, w], not negative.
        by: "peaks" or "threshold".
        share: of the highest response.
        apart: cells between a peak and the next denser place.
        smooth: side of the binomial kernel that makes densities of responses, odd; 1 for none.

    Returns:
        For each image float32 [K, 4]: top, left, bottom, right in cells, the far ends outside; K >= 1.

    Raises:
        RequestError: an unknown way, a share outside of 0 to 1, or an even smoothing.

    Example:
        >>> maps = torch.zeros(1, 6, 6)
        >>> maps[0, 1, 1], maps[0, 4, 4] = 1.0, 0.8
        >>> localise(maps, smooth=1)[0].tolist()
        [[1.0, 1.0, 2.0, 2.0], [4.0, 4.0, 5.0, 5.0]]
        >>> localise(maps, by="threshold")[0].tolist()
        [[1.0, 1.0, 5.0, 5.0]]
    """
    one_of(by, WAYS, what="way to localise")
    if not 0 <= share <= 1 or smooth < 1 or smooth % 2 == 0:
        raise RequestError(
            f"share={share}, smooth={smooth}", expected="a share from 0 to 1 and an odd side", do="choose others"
        )
    maps = response.detach().float()
    if by == "threshold":
        return [_box(one >= share * one.max()) for one in maps]
    step = max(1, CHUNK // (maps[0].numel() ** 2))
    return [box for i in range(0, len(maps), step) for box in _peaks(maps[i : i + step], share, apart, smooth)]


def densities(maps: Tensor, *, smooth: int = 3) -> tuple[Tensor, Tensor]:
    """Return rho and delta of maps [B, h, w], [B, h * w] each; see `localise`."""
    taps = torch.tensor([math.comb(smooth - 1, i) for i in range(smooth)]).to(maps) / 2 ** (smooth - 1)
    kernel = torch.outer(taps, taps)[None, None]
    rho = F.conv2d(maps[:, None], kernel, padding=smooth // 2).flatten(1)  # nothing outside: edges are no denser
    h, w = maps.shape[1:]
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(maps)
    distance, order = torch.cdist(at, at), torch.arange(h * w, device=maps.device)
    here, there = rho[:, :, None], rho[:, None, :]
    higher = (there > here) | ((there == here) & (order < order[:, None]))
    delta = torch.where(higher, distance, torch.inf).amin(-1)
    return rho, torch.where(delta.isinf(), distance.amax(-1), delta)


def _peaks(maps: Tensor, share: float, apart: float, smooth: int) -> list[Tensor]:
    rho, delta = densities(maps, smooth=smooth)
    found = []
    for r, d in zip(rho, delta):
        keep = (r >= share * r.max()) & (d >= apart)
        keep[int((r == r.max()).nonzero()[0])] = (
            True  # the densest is a peak, whatever is asked of distances on a small map
        )
        ids = keep.nonzero()[:, 0]
        ids = ids[r[ids].argsort(descending=True, stable=True)]
        corner = torch.stack([ids // maps.shape[2], ids % maps.shape[2]], 1).float()
        found.append(torch.cat([corner, corner + 1], 1))
    return found


def _box(inside: Tensor) -> Tensor:
    at = inside.nonzero().float()
    return torch.cat([at.amin(0), at.amax(0) + 1])[None]
