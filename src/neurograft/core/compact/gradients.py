"""Gradients of chosen entries of a weight, without its dense gradient.

Every matrix product is read as dW = a.T @ b, with a [N, R] on the row side of the weight and b [N, C] on its
column side; one of the two is the operation's input, the other the gradient of its output. `y = x @ W.T`
has x on the column side; `y = x @ W` (GPT-2's Conv1D, some expert banks) on the row side.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neurograft.core.numerics.matmul import matmul
from neurograft.core.region import Region

Side = Literal["row", "column"]

# Up to LOOP entries in every row a gather per entry wins; above DENSE of the weight (BLOCKS of it for blocks),
# dense products over chunks of rows win; sampled products in between (measured on CPU by `benchmarks/routes.py`).
LOOP, DENSE, BLOCKS, CHUNK, GATHER = 2, 0.15, 0.1, 256, 1 << 24


@dataclass(frozen=True)
class Route:
    """How the gradient of a region is found for an input on one side of the weight.

    Args:
        name: "thin product", "blocks", "loop", "sampled product", "dense chunks" or "whole"; shown by `plan`.
        side: the side of the weight on which the operation's input stands.
        keep: features of the input that the gradient needs, or None for all of them.
        region: the entries, with ids local to one matrix.
        index: layout-specific index tensors, precomputed once.
        bounds: for "dense chunks", where each chunk's entries begin and end.
    """

    name: str
    side: Side
    keep: Tensor | None
    region: Region
    index: tuple[Tensor, ...] = ()
    bounds: tuple[int, ...] = ()

    @property
    def asked(self) -> Tensor | None:
        """Features of g that alone are read, or None for all."""
        return self.region.ids if self.region.layout == ("rows" if self.side == "column" else "cols") else None

    def thin(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the gradient from x [N, f] and the asked features of g, [N, k]."""
        return matmul(g.t(), x.to(g.dtype))

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the gradient of the region's values from the kept input x [N, f] and g [N, m] = dL/dy."""
        if self.asked is not None:
            return self.thin(x, g.index_select(1, self.asked))
        x = x.to(g.dtype)
        a, b = (x, g) if self.side == "row" else (g, x)
        layout = self.region.layout
        if layout in ("rows", "cols"):  # x keeps only the chosen features
            return matmul(x.t(), g)
        if layout == "all":
            return matmul(a.t(), b).reshape(self.region.shape)
        if layout == "block":
            return self._block_chunks(a, b) if self.bounds else self._blocks(a, b)
        return {"loop": self._loop, "sampled product": self._sampled, "dense chunks": self._chunks}[self.name](a, b)

    def _blocks(self, a: Tensor, b: Tensor) -> Tensor:
        assert self.region.block is not None
        (high, wide), (i, j) = self.region.block, self.index
        left, right = a.reshape(len(a), -1, high).permute(1, 2, 0), b.reshape(len(b), -1, wide).transpose(0, 1)
        step = max(1, GATHER // (len(a) * (high + wide)))  # the gathered copies stay bounded whatever k is
        parts = [left.index_select(0, p) @ right.index_select(0, q) for p, q in zip(i.split(step), j.split(step))]
        return torch.cat(parts)

    def _block_chunks(self, a: Tensor, b: Tensor) -> Tensor:
        assert self.region.block is not None
        (high, wide), (i, j), out = self.region.block, self.index, []
        strips = max(1, CHUNK // high)
        for chunk, (lo, hi) in enumerate(zip(self.bounds, self.bounds[1:])):
            if hi > lo:
                first = chunk * strips
                dense = matmul(a[:, first * high : (first + strips) * high].t(), b)
                grid = dense.reshape(-1, high, b.shape[1] // wide, wide).transpose(1, 2)
                out.append(grid[i[lo:hi] - first, j[lo:hi]])
        return torch.cat(out)

    def _loop(self, a: Tensor, b: Tensor) -> Tensor:
        (columns,) = self.index  # [R, k]
        return torch.stack([(a * b.index_select(1, c)).sum(0) for c in columns.unbind(1)], 1).reshape(-1)

    def _sampled(self, a: Tensor, b: Tensor) -> Tensor:
        crow, column = self.index
        return sampled_product(a, b, crow, column)

    def _chunks(self, a: Tensor, b: Tensor) -> Tensor:
        columns, out = b.shape[1], []
        for chunk, (lo, hi) in enumerate(zip(self.bounds, self.bounds[1:])):
            if hi > lo:
                first = chunk * CHUNK
                dense = matmul(a[:, first : first + CHUNK].t(), b)
                out.append(dense.reshape(-1).index_select(0, self.region.ids[lo:hi] - first * columns))
        return torch.cat(out)


@torch.library.custom_op("neurograft::sampled_product", mutates_args=())
def sampled_product(a: Tensor, b: Tensor, crow: Tensor, column: Tensor) -> Tensor:
    """Return entries of a.T @ b at the positions of a CSR pattern; one opaque step for compilers.

    Args:
        a: [N, R]. b: [N, C]. crow: [R + 1]. column: [k].

    Returns:
        [k], in the pattern's order.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> sampled_product(a, b, torch.tensor([0, 1, 2]), torch.tensor([1, 0])).tolist()
        [4.0, 6.0]
    """
    work = a.dtype if a.dtype in (torch.float32, torch.float64) else torch.float32  # no other dtype has a kernel
    zeros = torch.zeros(len(column), dtype=work, device=a.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        pattern = torch.sparse_csr_tensor(crow, column, zeros, (a.shape[1], b.shape[1]), check_invariants=False)
        found = torch.sparse.sampled_addmm(pattern, a.t().to(work).contiguous(), b.to(work).contiguous(), beta=0.0)
    return found.values().clone()


@sampled_product.register_fake
def _(a: Tensor, b: Tensor, crow: Tensor, column: Tensor) -> Tensor:
    work = a.dtype if a.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.empty(column.shape, dtype=work, device=a.device)


def route(region: Region, side: Side, device: torch.device) -> Route:
    """Choose how to find the gradient of a region inside one [R, C] matrix, by its measured density.

    Args:
        region: entries with ids local to the matrix (E = 1).
        side: where the operation's input stands.
        device: where the index tensors go.
    """
    region = region.to(device)
    _, rows, columns = region.matrix
    if region.layout == "all":
        return Route("whole", side, None, region)
    if region.layout in ("rows", "cols"):
        thin = (region.layout == "rows") == (side == "row")
        return Route("thin product", side, region.ids if thin else None, region)
    if region.layout == "block":
        return _block_route(region, side)
    r, c = region.ids // columns, region.ids % columns
    counts = torch.bincount(r, minlength=rows)
    if len(region.ids) > DENSE * rows * columns:
        edges = torch.arange(0, rows + CHUNK, CHUNK, device=device).clamp(max=rows) * columns
        bounds = tuple(torch.searchsorted(region.ids, edges).tolist())
        return Route("dense chunks", side, None, region, bounds=bounds)
    keep, local = (r if side == "row" else c).unique(return_inverse=True)
    restrict = len(keep) < 0.7 * (rows if side == "row" else columns)
    if int(counts.min()) == int(counts.max()) <= LOOP:
        if side == "column" and restrict:
            return Route("loop", side, keep, region, (local.view(rows, -1),))
        return Route("loop", side, None, region, (c.view(rows, -1),))
    if side == "column":
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Route("sampled product", side, keep if restrict else None, region, (crow, local if restrict else c))
    if restrict:
        counts = counts[keep]
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Route("sampled product", side, keep if restrict else None, region, (crow, c))


def _block_route(region: Region, side: Side) -> Route:
    assert region.block is not None
    (high, wide), across = region.block, region.matrix[2] // region.block[1]
    i, j = region.ids // across, region.ids % across
    if len(region.ids) > BLOCKS * region.total:
        strips = max(1, CHUNK // high)
        grid_rows = region.matrix[1] // high
        edges = torch.arange(0, grid_rows + strips, strips, device=i.device).clamp(max=grid_rows)
        return Route("dense chunks", side, None, region, (i, j), tuple(torch.searchsorted(i, edges).tolist()))
    mine, size = (i, high) if side == "row" else (j, wide)
    distinct, local = mine.unique(return_inverse=True)
    keep = (distinct[:, None] * size + torch.arange(size, device=distinct.device)).reshape(-1)
    return Route("blocks", side, keep, region, (local, j) if side == "row" else (i, local))
