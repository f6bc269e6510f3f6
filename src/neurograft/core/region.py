"""Regions: which numbers of one parameter are touched, in the narrowest shape that describes them.

Shape letters: E matrices in a bank, R rows, C columns of each; k chosen rows, columns, blocks or entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.units import Part

Layout = Literal["rows", "cols", "block", "flat", "all"]


@dataclass(frozen=True)
class Region:
    """A set of entries of one parameter, and the order of their values.

    layout  ids number                         values
    rows    the E*R rows                       [k, C]
    cols    the E*C columns                    [k, R]
    block   the grid of blocks, row by row     [k, h, w]
    flat    the entries                        [k]
    all     nothing                            the parameter's shape

    Rows and columns share one layout of values, [k, other side]: it is what makes their gradients thin
    matrix products.

    Args:
        shape: the parameter's shape.
        matrix: (E, R, C), how the parameter is read as matrices; E = 1 but for banks of experts.
        layout: see above.
        ids: sorted, unique, int64.
        block: (h, w), for layout "block".

    Example:
        >>> r = Region.of((4, 3), "cols", [1])
        >>> r.read(torch.arange(12.).view(4, 3)).tolist()
        [[1.0, 4.0, 7.0, 10.0]]
    """

    shape: tuple[int, ...]
    matrix: tuple[int, int, int]
    layout: Layout
    ids: Tensor
    block: tuple[int, int] | None = field(default=None)

    @staticmethod
    def of(
        shape: Iterable[int],
        layout: Layout,
        ids: Iterable[int] | Tensor = (),
        *,
        matrix: tuple[int, int, int] | None = None,
        block: tuple[int, int] | None = None,
    ) -> Region:
        """Build a region; ids are sorted and must be unique and in range.

        Raises:
            RequestError: an id is out of range or appears twice.
        """
        shape = tuple(int(s) for s in shape)
        matrix = matrix or as_matrix(shape)
        raw = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
        sorted_ids = raw.detach().to("cpu", torch.int64).reshape(-1).sort().values
        made = Region(shape, matrix, layout, sorted_ids, block)
        if len(sorted_ids) and (sorted_ids[0] < 0 or sorted_ids[-1] >= made.total):
            raise RequestError(
                f"{layout} ids from {int(sorted_ids[0])} to {int(sorted_ids[-1])} for a parameter of shape {shape}",
                expected=f"ids from 0 to {made.total - 1}",
                do="take the ids from a selection made on this model",
            )
        if len(sorted_ids) > 1 and bool((sorted_ids[1:] == sorted_ids[:-1]).any()):
            raise RequestError(f"{layout} ids with repetitions", expected="each id once", do="use unique ids")
        return made

    @property
    def total(self) -> int:
        """How many ids the layout has in this parameter."""
        bank, rows, columns = self.matrix
        if self.layout == "rows":
            return bank * rows
        if self.layout == "cols":
            return bank * columns
        if self.layout == "block":
            assert self.block is not None
            return (rows // self.block[0]) * (columns // self.block[1])
        return math.prod(self.shape) if self.layout == "flat" else 0

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the values tensor."""
        _, rows, columns = self.matrix
        k = len(self.ids)
        if self.layout == "rows":
            return (k, columns)
        if self.layout == "cols":
            return (k, rows)
        if self.layout == "block":
            assert self.block is not None
            return (k, *self.block)
        return (k,) if self.layout == "flat" else self.shape

    @property
    def numel(self) -> int:
        """How many numbers are touched."""
        return math.prod(self.values_shape)

    def to(self, device: torch.device | str) -> Region:
        """Return the region with its ids on `device`."""
        return Region(self.shape, self.matrix, self.layout, self.ids.to(device), self.block)

    def read(self, weight: Tensor) -> Tensor:
        """Copy the touched numbers of a contiguous `weight`, in its dtype."""
        bank, rows, columns = self.matrix
        w, ids = weight.detach(), self.ids.to(weight.device)
        if self.layout == "all":
            return w.clone()
        if self.layout == "rows":
            return w.reshape(bank * rows, columns).index_select(0, ids)
        if self.layout == "cols":
            if bank == 1:
                return w.reshape(rows, columns).index_select(1, ids).t().contiguous()
            return w.reshape(bank, rows, columns)[ids // columns, :, ids % columns].contiguous()
        if self.layout == "block":
            return self._grid(w)[*self._corner(ids)].contiguous()
        return w.reshape(-1).index_select(0, ids)

    def write_(self, weight: Tensor, values: Tensor) -> None:
        """Write `values` into a contiguous `weight` without raising its version counter.

        The write goes through `.data`: W is saved by autograd for the input gradient, and a write between two
        steps must not look like an in-place change of a live graph. `core.compact.live` guards the graphs instead.
        """
        bank, rows, columns = self.matrix
        w, ids = weight.data, self.ids.to(weight.device)
        values = values.detach().to(device=w.device, dtype=w.dtype)
        if self.layout == "all":
            w.copy_(values)
        elif self.layout == "rows":
            w.view(bank * rows, columns).index_copy_(0, ids, values)
        elif self.layout == "cols" and bank == 1:
            # Half the time of index_copy_ here, or less. As whole numbers: scatter_ of bfloat16 rewrites the bits of
            # every NaN, also where nothing is written.
            bits = torch.int16 if w.dtype == torch.bfloat16 else w.dtype
            w.view(rows, columns).view(bits).scatter_(1, ids.expand(rows, -1), values.t().view(bits))
        elif self.layout == "cols":
            w.view(bank, rows, columns)[ids // columns, :, ids % columns] = values
        elif self.layout == "block":
            self._grid(w)[*self._corner(ids)] = values
        else:
            w.view(-1).index_copy_(0, ids, values)

    def flat(self) -> Tensor:
        """Return the flat entry numbers in the order of the values, int64, on the ids' device."""
        _, rows, columns = self.matrix
        ids = self.ids
        if self.layout == "flat":
            return ids
        if self.layout == "all":
            return torch.arange(math.prod(self.shape), device=ids.device)
        across = torch.arange(columns, device=ids.device)
        if self.layout == "rows":
            return (ids[:, None] * columns + across).reshape(-1)
        if self.layout == "cols":
            down = torch.arange(rows, device=ids.device) * columns
            return ((ids // columns * (rows * columns) + ids % columns)[:, None] + down).reshape(-1)
        assert self.block is not None
        high, wide = self.block
        i, j = self._corner(ids)
        start = i * high * columns + j * wide
        inner = torch.arange(high, device=ids.device)[:, None] * columns + torch.arange(wide, device=ids.device)
        return (start[:, None] + inner.reshape(-1)).reshape(-1)

    def flattened(self) -> tuple[Region, Tensor]:
        """Return the same entries as a "flat" region, and where each of its values stands in ours."""
        entries = self.flat().cpu()
        order = entries.argsort()
        return Region(self.shape, self.matrix, "flat", entries[order]), order

    def contains(self, other: Region) -> bool:
        """Say whether every entry of `other` is in this region."""
        if self.layout == "all":
            return True
        if self.alike(other):
            return bool(torch.isin(other.ids, self.ids).all())
        return bool(torch.isin(other.flat(), self.flat()).all())

    def alike(self, other: Region) -> bool:
        """Say whether the ids of both number the same things, so that equal ids are equal entries."""
        if self.layout != other.layout or self.layout in ("flat", "all"):
            return self.layout == other.layout
        return self.matrix == other.matrix and self.block == other.block

    def _grid(self, w: Tensor) -> Tensor:
        assert self.block is not None
        (_, rows, columns), (high, wide) = self.matrix, self.block
        return w.view(rows // high, high, columns // wide, wide).transpose(1, 2)

    def _corner(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        assert self.block is not None
        across = self.matrix[2] // self.block[1]
        return ids // across, ids % across


def as_matrix(shape: tuple[int, ...], *, bank: bool | None = None) -> tuple[int, int, int]:
    """Read a parameter's shape as (E, R, C).

    A 3-D parameter is a bank unless `bank` is False (a 1-D convolution); anything wider is flattened behind
    its first axis; a 1-D parameter is one row.

    Example:
        >>> as_matrix((8, 4, 3)), as_matrix((8, 4, 3), bank=False), as_matrix((5,))
        ((8, 4, 3), (1, 8, 12), (1, 1, 5))
    """
    if len(shape) <= 1:
        return (1, 1, math.prod(shape))
    if len(shape) == 3 and bank is not False:
        return (shape[0], shape[1], shape[2])
    return (1, shape[0], math.prod(shape[1:]))


def region_of(part: Part, ids: Tensor, shape: tuple[int, ...], matrix: tuple[int, int, int]) -> Region:
    """Return the narrowest region that holds the chosen units of a part.

    Whole rows become "rows", whole columns of one matrix "cols", a grid of blocks "block"; everything else,
    and every 1-D parameter, becomes "flat".
    """
    bank, rows, columns = matrix
    numel = math.prod(shape)
    if part.n * part.size == numel and len(ids) == part.n:
        return Region(shape, matrix, "all", torch.empty(0, dtype=torch.int64))
    starts = part.offsets(ids)
    if len(shape) > 1:
        if part.repeat == 1 and part.run % columns == 0 and bool((starts % columns == 0).all()):
            first = starts // columns
            chosen = (first[:, None] + torch.arange(part.run // columns)).reshape(-1)
            return Region.of(shape, "rows", chosen.unique(), matrix=matrix)
        within = starts % (rows * columns)
        if part.repeat == rows and part.repeat_stride == columns and bool((within < columns).all()):
            first = starts // (rows * columns) * columns + within
            chosen = (first[:, None] + torch.arange(part.run)).reshape(-1)
            return Region.of(shape, "cols", chosen.unique(), matrix=matrix)
        if (
            len(part.units) == 2
            and bank == 1
            and part == Part.blocks(part.param, (rows, columns), (part.repeat, part.run))
        ):
            return Region.of(shape, "block", ids, matrix=matrix, block=(part.repeat, part.run))
    return Region.of(shape, "flat", part.flat(ids).reshape(-1).unique(), matrix=matrix)


def union(regions: Iterable[Region]) -> Region:
    """Return the entries of any of the regions, in a shared layout if they have one, else as "flat"."""
    found = list(regions)
    first = found[0]
    if any(r.layout == "all" for r in found):
        return next(r for r in found if r.layout == "all")
    if all(first.alike(r) for r in found):
        ids = torch.cat([r.ids.cpu() for r in found]).unique()
    else:
        ids = torch.cat([r.flat().cpu() for r in found]).unique()
        return Region.of(first.shape, "flat", ids, matrix=first.matrix)
    if first.layout != "flat" and first.numel and len(ids) == first.total:
        return Region(first.shape, first.matrix, "all", torch.empty(0, dtype=torch.int64))
    return Region.of(first.shape, first.layout, ids, matrix=first.matrix, block=first.block)


def positions(inner: Region, outer: Region) -> Tensor:
    """Return where the values of `inner` stand among those of `outer`, flattened; `inner` must be contained.

    Example:
        >>> a, b = Region.of((4, 3), "rows", [2]), Region.of((4, 3), "rows", [0, 2])
        >>> positions(a, b).tolist()
        [3, 4, 5]
    """
    if outer.layout == "all":
        return inner.flat().cpu()
    if inner.alike(outer):
        where = torch.searchsorted(outer.ids, inner.ids)
        width = math.prod(inner.values_shape[1:])
        return (where[:, None] * width + torch.arange(width)).reshape(-1)
    flat = outer.flat().cpu()
    if outer.layout in ("flat", "rows"):  # sorted already
        return torch.searchsorted(flat, inner.flat().cpu())
    order = flat.argsort()
    return order[torch.searchsorted(flat[order], inner.flat().cpu())]
