"""Banks of matrices whose experts own consecutive rows of the input: opaque steps for compilers."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.compact.live import in_bank, of_bank
from neurograft.core.compact.through import through
from neurograft.core.region import Region


@torch.library.custom_op("neurograft::grouped_gradient", mutates_args=())
def grouped_gradient(
    x: Tensor, g: Tensor, offs: Tensor, ids: Tensor, layout: str, side: str, matrix: list[int]
) -> Tensor:
    """Return the gradient of chosen entries of a bank whose experts own consecutive rows of x and g.

    Args:
        x: [N, f], the grouped product's input. g: [N, m], the gradient of its output.
        offs: [E], where the rows of each expert stop.
        ids: the region's.
        layout: "rows", "cols", "flat" or "all". side: where x stands. matrix: (E, R, C).
    """
    region = Region((matrix[0], matrix[1], matrix[2]), (matrix[0], matrix[1], matrix[2]), layout, ids)  # type: ignore[arg-type]
    out, ends = torch.zeros(region.values_shape, dtype=g.dtype, device=g.device), offs.tolist()
    for bank, (lo, hi) in enumerate(zip([0, *ends], ends)):
        chosen, first, last = in_bank(region, bank, side)  # type: ignore[arg-type]
        if hi > lo and last > first:
            piece = x[lo:hi] if chosen.keep is None else x[lo:hi].index_select(-1, chosen.keep)
            out[first:last] = chosen.gradient(piece, g[lo:hi]).view(out[first:last].shape)
    return out


@grouped_gradient.register_fake
def _(x: Tensor, g: Tensor, offs: Tensor, ids: Tensor, layout: str, side: str, matrix: list[int]) -> Tensor:
    shape = (matrix[0], matrix[1], matrix[2])
    return g.new_empty(Region(shape, shape, layout, ids).values_shape)  # type: ignore[arg-type]


@torch.library.custom_op("neurograft::grouped_through", mutates_args=())
def grouped_through(
    v: Tensor, values: Tensor, offs: Tensor, ids: Tensor, layout: str, side: str, matrix: list[int]
) -> Tensor:
    """Return for the rows of every expert their product with the chosen entries of its matrix; see `through`.

    Args:
        v: [N, C] or [N, R]. values: of the region, in v's dtype. Others as for `grouped_gradient`.
    """
    shape = (matrix[0], matrix[1], matrix[2])
    region = Region(shape, shape, layout, ids)  # type: ignore[arg-type]
    out, ends = v.new_zeros(len(v), matrix[1 if side == "column" else 2]), offs.tolist()
    with torch.autocast(v.device.type, enabled=False):
        for bank, (lo, hi) in enumerate(zip([0, *ends], ends)):
            local, first, last = of_bank(region, bank)
            if hi > lo and last > first:
                out[lo:hi] = through(v[lo:hi], values[first:last], local, side)  # type: ignore[arg-type]
    return out


@grouped_through.register_fake
def _(v: Tensor, values: Tensor, offs: Tensor, ids: Tensor, layout: str, side: str, matrix: list[int]) -> Tensor:
    return v.new_empty(v.shape[0], matrix[1 if side == "column" else 2])
