"""Products with a matrix of which only chosen entries are not 0, without that matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.compact.gradients import CHUNK, DENSE, GATHER, Side
from neurograft.core.region import Region


def through(v: Tensor, values: Tensor, region: Region, side: Side, onto: Tensor | None = None) -> Tensor:
    """Return v @ S.T (side "column") or v @ S (side "row") for a matrix S [R, C] that holds `values` in a region.

    Args:
        v: [N, C] or [N, R]: it stands on `side` of S.
        values: shaped `region.values_shape`, in v's dtype.
        region: the entries, inside one matrix (E = 1).
        side: see above.
        onto: [N, the other side], to which the product is added; it is not written.

    Example:
        >>> region = Region.of((2, 3), "flat", [1, 5])
        >>> through(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([10.0, 1.0]), region, "column").tolist()
        [[20.0, 3.0]]
    """
    _, rows, columns = region.matrix
    layout, ids = region.layout, region.ids
    if layout in ("rows", "cols"):
        if (layout == "rows") == (side == "row"):
            return _added(onto, v.index_select(1, ids) @ values)
        return _start(onto, v, region, side).index_add(1, ids, v @ values.t())
    if layout == "all":
        full = values.view(rows, columns)
        return _added(onto, v @ (full.t() if side == "column" else full))
    if layout == "block":
        return _blocks(v, values, region, side, _start(onto, v, region, side))
    return _added(onto, scattered_product(v, values, ids, rows, columns, side))


def other(side: Side) -> Side:
    """Return the side on which the result of a product stands."""
    return "row" if side == "column" else "column"


def _added(onto: Tensor | None, part: Tensor) -> Tensor:
    return part if onto is None else onto + part


def _start(onto: Tensor | None, v: Tensor, region: Region, side: Side) -> Tensor:
    return v.new_zeros(len(v), region.matrix[1 if side == "column" else 2]) if onto is None else onto


def _blocks(v: Tensor, values: Tensor, region: Region, side: Side, out: Tensor) -> Tensor:
    assert region.block is not None
    (high, wide), across = region.block, region.matrix[2] // region.block[1]
    i, j = region.ids // across, region.ids % across
    (mine, size), (theirs, width) = ((j, wide), (i, high)) if side == "column" else ((i, high), (j, wide))
    each = values.transpose(1, 2) if side == "column" else values
    grid = v.reshape(len(v), -1, size).transpose(0, 1)
    step = max(1, GATHER // max(1, len(v) * (high + wide)))  # the gathered copies stay bounded whatever k is
    found = out.reshape(len(v), -1, width)
    for p, q, block in zip(mine.split(step), theirs.split(step), each.split(step)):
        found = found.index_add(1, q, (grid.index_select(0, p) @ block).transpose(0, 1))
    return found.reshape(out.shape)


@torch.library.custom_op("neurograft::scattered_product", mutates_args=())
def scattered_product(v: Tensor, values: Tensor, ids: Tensor, rows: int, columns: int, side: str) -> Tensor:
    """Return `through` for scattered entries: a sparse product, or dense ones over chunks of rows.

    Args:
        v: [N, C] or [N, R]. values: [k]. ids: [k], entry numbers, sorted. rows, columns: R and C.
        side: where v stands.

    Returns:
        [N, R] or [N, C], in v's dtype.
    """
    work = v.dtype if v.dtype in (torch.float32, torch.float64) else torch.float32  # no other dtype has a kernel
    with torch.autocast(v.device.type, enabled=False):
        wide, held = v.to(work), values.to(work)
        if len(ids) > DENSE * rows * columns:
            out = _chunks(wide, held, ids, rows, columns, side)
        else:
            place = torch.stack([ids // columns, ids % columns])
            matrix = torch.sparse_coo_tensor(place, held, (rows, columns), is_coalesced=True, check_invariants=False)
            out = torch.sparse.mm(matrix if side == "column" else matrix.t(), wide.t()).t()
        return out.to(v.dtype).contiguous()


def _chunks(v: Tensor, values: Tensor, ids: Tensor, rows: int, columns: int, side: str) -> Tensor:
    out = v.new_zeros(len(v), rows if side == "column" else columns)
    for first in range(0, rows, CHUNK):
        last = min(first + CHUNK, rows)
        edges = torch.tensor([first * columns, last * columns], device=ids.device)
        lo, hi = torch.searchsorted(ids, edges).tolist()
        if hi > lo:
            dense = v.new_zeros((last - first) * columns).index_copy_(0, ids[lo:hi] - first * columns, values[lo:hi])
            dense = dense.view(-1, columns)
            if side == "column":
                out[:, first:last] = v @ dense.t()
            else:
                out += v[:, first:last] @ dense
    return out


@scattered_product.register_fake
def _(v: Tensor, values: Tensor, ids: Tensor, rows: int, columns: int, side: str) -> Tensor:
    return v.new_empty(v.shape[0], rows if side == "column" else columns)
