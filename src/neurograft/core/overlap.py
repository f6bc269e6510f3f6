"""Where regions of one parameter meet, and what one leaves of another, at the cost of the smaller of the two."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from neurograft.core.region import Region

Index = Tensor | slice
Piece = tuple[Region, Tensor]  # entries and their values, shaped `values_shape`


def meeting(one: Region, other: Region) -> tuple[Index, Index, int]:
    """Return where the entries that both regions hold stand among the values of each, viewed as [-1, run], and run.

    Where the ids of both number the same things only ids are compared, else the entries of the smaller region.

    Example:
        >>> a, b = Region.of((4, 2), "rows", [0, 2]), Region.of((4, 2), "rows", [2, 3])
        >>> mine, theirs, run = meeting(a, b)
        >>> mine.tolist(), theirs.tolist(), run
        ([1], [0], 2)
    """
    if one.alike(other):
        mine, theirs, run = one.ids.cpu(), other.ids.cpu(), width(one)
        if torch.equal(mine, theirs):
            return slice(None), slice(None), run
        if len(mine) > len(theirs):
            held, where = _among(theirs, mine)
            return where, held.nonzero().reshape(-1), run
        held, where = _among(mine, theirs)
        return held.nonzero().reshape(-1), where, run
    if one.layout == "all" or (other.layout != "all" and one.numel > other.numel):
        here, there, run = meeting(other, one)
        return there, here, run
    entries = one.flat().cpu()
    if other.layout == "all":
        return slice(None), entries, 1
    held, where = find(other, entries)
    return held.nonzero().reshape(-1), where, 1


def width(region: Region) -> int:
    """Return how many values a region has for each of its ids; for layout "all" how many there are."""
    return max(1, region.numel if region.layout == "all" else math.prod(region.values_shape[1:]))


def find(region: Region, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries a region holds, bool, and where those stand among its flattened values.

    Args:
        region: of any layout but "all".
        entries: flat entry numbers, int64, on the CPU.

    Example:
        >>> held, where = find(Region.of((4, 3), "cols", [0, 2]), torch.tensor([5, 7]))
        >>> held.tolist(), where.tolist()
        ([True, False], [5])
    """
    (_, rows, columns), known = region.matrix, region.ids.cpu()
    if region.layout == "flat":
        return _among(entries, known)
    if region.layout == "rows":
        ids, inner = entries // columns, entries % columns
    elif region.layout == "cols":
        ids = entries // (rows * columns) * columns + entries % columns
        inner = entries // columns % rows
    else:
        assert region.block is not None
        (high, wide), i, j = region.block, entries // columns, entries % columns
        ids, inner = i // high * (columns // wide) + j // wide, i % high * wide + j % wide
    held, where = _among(ids, known)
    return held, where * width(region) + inner[held]


def _among(ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return which ids are among sorted known ones, bool, and where those stand there."""
    if not len(known):
        return torch.zeros_like(ids, dtype=torch.bool), ids[:0]
    where = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
    held = known[where] == ids
    return held, where[held]


def shared(one: Region, other: Region) -> tuple[Tensor, Tensor]:
    """Return where the entries both regions hold stand among the values of each, flattened.

    Example:
        >>> a, b = Region.of((4, 2), "rows", [0, 2]), Region.of((4, 2), "rows", [2, 3])
        >>> [where.tolist() for where in shared(a, b)]
        [[2, 3], [0, 1]]
    """
    *indices, run = meeting(one, other)
    places = [torch.arange(r.numel).view(-1, run)[i].reshape(-1) for r, i in zip((one, other), indices)]
    return places[0], places[1]


def parted(piece: Piece, by: Region) -> tuple[Piece | None, Piece | None]:
    """Return what of a piece a region holds, and what it does not; None where that is nothing.

    Example:
        >>> rows = Region.of((3, 2), "rows", [0, 2])
        >>> inside, rest = parted((rows, rows.read(torch.arange(6.0).view(3, 2))), Region.of((3, 2), "flat", [4]))
        >>> inside[1].tolist(), rest[0].ids.tolist()
        ([4.0], [0, 1, 5])
    """
    region, values = piece
    mine, _, run = meeting(region, by)
    if isinstance(mine, slice) or not len(mine):
        return (piece, None) if isinstance(mine, slice) else (None, piece)
    inside = torch.zeros(region.numel // run, dtype=torch.bool)
    inside[mine] = True
    return _taken(region, values, run, inside), _taken(region, values, run, ~inside)


def _taken(region: Region, values: Tensor, run: int, held: Tensor) -> Piece | None:
    chosen = held.nonzero().reshape(-1)
    if len(chosen) in (0, len(held)):
        return (region, values) if len(chosen) else None
    if region.layout != "all" and run == width(region):
        return Region(region.shape, region.matrix, region.layout, region.ids.cpu()[chosen], region.block), values[
            chosen
        ]
    entries, order = region.flat().cpu()[chosen].sort()
    return Region(region.shape, region.matrix, "flat", entries), values.reshape(-1)[chosen[order]]


def together(pieces: Iterable[Piece]) -> list[Piece]:
    """Return disjoint pieces with those of one layout joined, their entries in order.

    Example:
        >>> pieces = [(Region.of((9,), "flat", ids), torch.tensor(ids)) for ids in ([1, 7], [3])]
        >>> together(pieces)[0][1].tolist()
        [1, 3, 7]
    """
    groups: list[list[Piece]] = []
    for piece in pieces:
        group = next((g for g in groups if g[0][0].alike(piece[0])), None)
        if group is None:
            groups.append([piece])
        else:
            group.append(piece)
    return [_joined(group) for group in groups]


def _joined(group: list[Piece]) -> Piece:
    if len(group) == 1:
        return group[0]
    first = group[0][0]
    ids, order = torch.cat([region.ids.cpu() for region, _ in group]).sort()
    values = torch.cat([numbers for _, numbers in group])[order]
    return Region(first.shape, first.matrix, first.layout, ids, first.block), values
