"""Sets of entry numbers in few bytes: narrow ids, distances, or a bit for each entry; and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurograft.core.region import Region


def shortest(region: Region) -> tuple[str, Tensor]:
    """Return a set of entries as "bits", one for each entry of the tensor, or as "flat" distances if that is shorter.

    Example:
        >>> shortest(Region.of((4, 4), "flat", [0, 3, 8]))[1].tolist(), shortest(Region.of((99, 99), "flat", [7]))[0]
        ([9, 1], 'flat')
    """
    entries = region.flat().cpu().sort().values
    ids = narrow_ids(entries, gaps=True)
    total = math.prod(region.shape)
    if ids.numel() * ids.element_size() < -(-total // 8):
        return "flat", ids
    mask = torch.zeros(total, dtype=torch.bool)
    mask[entries] = True
    return "bits", packed_bits(mask)


def packed_bits(mask: Tensor) -> Tensor:
    """Return bool [n] as uint8 [ceil(n / 8)], the first entry in the lowest bit."""
    padded = torch.zeros(-(-len(mask) // 8) * 8, dtype=torch.uint8)
    padded[: len(mask)] = mask
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked_bits(bits: Tensor) -> Tensor:
    """Read what `packed_bits` wrote, bool [8 k], unused bits False."""
    return ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().reshape(-1)


def narrow_ids(ids: Tensor, *, gaps: bool) -> Tensor:
    """Return sorted ids in the narrowest unsigned type, as distances from the one before if `gaps`.

    Example:
        >>> narrow_ids(torch.tensor([3, 70000, 70001]), gaps=True).tolist()
        [3, 69997, 1]
    """
    coded = torch.cat([ids[:1], ids.diff()]) if gaps else ids
    top = int(coded.max()) if len(coded) else 0
    dtype = torch.uint8 if top < 1 << 8 else torch.uint16 if top < 1 << 16 else torch.uint32
    return coded.to("cpu", dtype if top < 1 << 32 else torch.int64)


def wide_ids(coded: Tensor, *, gaps: bool) -> Tensor:
    """Read what `narrow_ids` wrote."""
    ids = coded.to(torch.int64)
    return ids.cumsum(0) if gaps else ids
