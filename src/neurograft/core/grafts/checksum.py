"""Whether somebody wrote into a base since it was last read: a checksum at a fraction of a digest's price."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from neurograft.core.overlap import Piece, together
from neurograft.core.region import Region

PIECE = 1 << 18  # numbers that are looked at at a time; the checksum does not depend on it


def checksum(weight: Tensor, rows: range, matrix: tuple[int, int, int], originals: Iterable[Piece]) -> int:
    """Return the CRC-32 of neighbouring rows of a parameter, as the base has them.

    It tells a write from none, not one base from another: that is the digest's part.

    Args:
        weight: contiguous.
        rows: of the E*R rows.
        matrix: (E, R, C), how the parameter is read as matrices.
        originals: the base's numbers where grafts lie on it.

    Example:
        >>> w, matrix, row = torch.ones(3, 2), (1, 3, 2), Region.of((3, 2), "rows", [1])
        >>> before = checksum(w, range(3), matrix, [])
        >>> w[1] = 5.0
        >>> [checksum(w, range(3), matrix, held) == before for held in ([], [(row, torch.ones(1, 2))])]
        [False, True]
    """
    found = 0
    over = [_by_rows(piece, matrix) for piece in together(originals)]
    for lo, hi in _windows(rows, matrix) if weight.numel() else ():
        here = weight.detach().view(-1, matrix[2])[lo:hi].cpu()
        cuts = [cut for piece in over if (cut := _cut(piece, lo, hi, matrix))]
        here = here.clone() if cuts else here
        for region, numbers in cuts:
            region.write_(here, numbers)
        found = zlib.crc32(here.view(torch.uint8).numpy().data, found)
    return found


def _windows(rows: range, matrix: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    """Give runs of rows, each inside of one matrix."""
    _, high, columns = matrix
    step, lo = max(1, PIECE // columns), rows.start
    while lo < rows.stop:
        hi = min(lo + step, rows.stop, (lo // high + 1) * high)
        yield lo, hi
        lo = hi


def _by_rows(piece: Piece, matrix: tuple[int, int, int]) -> Piece:
    """Return a piece in a layout that can be cut at rows."""
    region, numbers = piece
    if region.layout in ("flat", "all") or (region.layout != "block" and region.matrix == matrix):
        return piece
    flat, order = region.flattened()
    return flat, numbers.reshape(-1)[order]


def _cut(piece: Piece, lo: int, hi: int, matrix: tuple[int, int, int]) -> Piece | None:
    """Return what of a piece lies in rows lo to hi of one matrix, as a piece of these rows; None if nothing does."""
    (region, numbers), (_, high, columns) = piece, matrix
    shape, first, inner = (hi - lo, columns), lo, slice(None)
    if region.layout == "all":
        return Region(shape, (1, *shape), "all", region.ids), numbers.reshape(-1, columns)[lo:hi]
    scale, last = {"rows": 1, "flat": columns, "cols": columns}[region.layout], hi
    if region.layout == "cols":
        first = lo // high
        last, inner = first + 1, slice(lo - first * high, hi - first * high)
    a, b = torch.searchsorted(region.ids.cpu(), torch.tensor([first * scale, last * scale])).tolist()
    if a == b:
        return None
    ids, held = region.ids.cpu()[a:b] - first * scale, numbers[a:b]
    return Region(shape, (1, *shape), region.layout, ids), held[:, inner] if region.layout == "cols" else held
