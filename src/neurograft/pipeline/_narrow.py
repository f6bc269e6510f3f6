"""The narrowest change between two tensors, by the bytes it takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurograft.core.grafts.coordinates import everything, narrowest
from neurograft.core.grafts.delta import Slice
from neurograft.core.region import Region


def narrow_change(base: Tensor, tuned: Tensor, matrix: tuple[int, int, int]) -> Slice | None:
    """Return the change that turns `base` into `tuned` bit for bit, or None if they are equal.

    Rows, columns, single entries and the whole tensor are compared by the bytes of values and ids; float32
    values, ids as the graft file packs them.

    Args:
        base: the base's tensor.
        tuned: the tuned one, of the same shape, perhaps in another float dtype.
        matrix: how the tensor is read as matrices.

    Example:
        >>> base, tuned = torch.zeros(4, 5), torch.zeros(4, 5)
        >>> tuned[:, 2] = 1
        >>> narrow_change(base, tuned, (1, 4, 5)).region.layout
        'cols'
    """
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    before, after = base.detach().to("cpu", wide).reshape(-1), tuned.detach().to("cpu", wide).reshape(-1)
    bits = torch.int64 if wide == torch.float64 else torch.int32
    entries = (before.view(bits) != after.view(bits)).nonzero().reshape(-1)
    shape = tuple(base.shape)
    if not len(entries):
        return None
    region = _smallest(shape, entries, matrix, after.element_size())
    return Slice(region, region.read(after.view(shape)))


def _smallest(shape: tuple[int, ...], entries: Tensor, matrix: tuple[int, int, int], size: int) -> Region:
    _, rows, columns = matrix
    numel = math.prod(shape)
    if len(entries) * size >= numel * size or not shape:
        return everything(shape, matrix)
    costs = {"all": numel * size, "flat": len(entries) * (size + _width(entries))}
    ids = {"flat": entries}
    if len(shape) > 1:
        ids["rows"] = (entries // columns).unique()
        ids["cols"] = (entries // (rows * columns) * columns + entries % columns).unique()
        costs["rows"] = len(ids["rows"]) * (columns * size + 4)
        costs["cols"] = len(ids["cols"]) * (rows * size + 4)
    best = min(costs, key=lambda layout: (costs[layout], layout != "all"))
    if best == "all":
        return everything(shape, matrix)
    if best == "flat":
        return narrowest(shape, entries, matrix)[0]
    return Region.of(shape, "rows" if best == "rows" else "cols", ids[best], matrix=matrix)


def _width(entries: Tensor) -> int:
    gap = int(entries.diff().max()) if len(entries) > 1 else 0
    top = max(gap, int(entries[0]))
    return 1 if top < 1 << 8 else 2 if top < 1 << 16 else 4
