"""Rows and columns as exact low-rank factors: one factor is one-hot, the other holds the difference."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.grafts.delta import Shift
from neurograft.core.region import Region
from neurograft.export._changes import Touched

Factors = dict[int, list[tuple[Tensor, Tensor]]]  # matrix number -> (P [R, r], Q [r, C]), difference = sum of P @ Q
FEW = 0.125  # share of a matrix's rows, or columns


def factors(item: Touched) -> Factors | str:
    """Return a parameter's changes as exact factors of each of its matrices, or why there are none.

    Entries count as rows (or columns) if they lie in at most `FEW` of them.
    """
    found: Factors = {}
    for change, s in item.members:
        region = change.region
        _, rows, columns = region.matrix
        if isinstance(change, Shift):
            low = _low(change, s, rows)
            if low is None:
                return "a low-rank change that the modules store in pieces"
            found.setdefault(low[0], []).append(low[1:])
            continue
        if region.layout == "all":
            return "a dense change of a whole weight"
        split = _split(region, item.difference(change, s), limit=max(1, int(FEW * min(rows, columns))))
        if split is None:
            return "scattered entries"
        for e, pair in split.items():
            found.setdefault(e, []).append(pair)
    return found


def _low(change: Shift, s: float, rows: int) -> tuple[int, Tensor, Tensor] | None:
    """Return (matrix, P, Q) of a low-rank change of a whole matrix or of neighbouring rows of one."""
    low, region = change.low, change.region
    P, Q = low.B.float() * (low.scale * s), low.A.float()
    if low.transposed:
        P, Q = Q.t(), P.t()
    if region.layout == "all" and region.matrix[0] == 1:
        return 0, P, Q
    first = int(region.ids[0]) if region.layout == "rows" else -1
    neighbours = first >= 0 and int(region.ids[-1]) - first == len(region.ids) - 1 == len(P) - 1
    if not neighbours or change.piece.order is not None or first // rows != int(region.ids[-1]) // rows:
        return None
    wide = torch.zeros(rows, P.shape[1])
    wide[first % rows : first % rows + len(P)] = P
    return first // rows, wide, Q


def _split(region: Region, difference: Tensor, limit: int) -> dict[int, tuple[Tensor, Tensor]] | None:
    _, rows, columns = region.matrix
    layout, ids = region.layout, region.ids.cpu()
    if layout in ("flat", "block"):
        entries = region.flat().cpu()
        return _covered(entries, difference.reshape(-1), rows, columns, limit)
    per = rows if layout == "rows" else columns
    found = {}
    for e in (ids // per).unique().tolist():
        held = ids // per == e
        hot = torch.zeros(int(held.sum()), per)
        hot[torch.arange(len(hot)), ids[held] - e * per] = 1.0
        found[e] = (hot.t(), difference[held]) if layout == "rows" else (difference[held].t(), hot)
    return found


def _covered(
    entries: Tensor, difference: Tensor, rows: int, columns: int, limit: int
) -> dict[int, tuple[Tensor, Tensor]] | None:
    """Return factors of entries that lie in few rows or few columns; None if they do not."""
    found = {}
    size = rows * columns
    for e in (entries // size).unique().tolist():
        held = entries // size == e
        inside, values = entries[held] - e * size, difference[held]
        r, c = inside // columns, inside % columns
        (by_row, at_row), (by_column, at_column) = r.unique(return_inverse=True), c.unique(return_inverse=True)
        if min(len(by_row), len(by_column)) > limit:
            return None
        if len(by_row) <= len(by_column):
            Q, P = torch.zeros(len(by_row), columns), torch.zeros(rows, len(by_row))
            Q[at_row, c], P[by_row, torch.arange(len(by_row))] = values, 1.0
        else:
            P, Q = torch.zeros(rows, len(by_column)), torch.zeros(len(by_column), columns)
            P[r, at_column], Q[torch.arange(len(by_column)), by_column] = values, 1.0
        found[e] = (P, Q)
    return found


def mismatches(item: Touched, made: Factors, *, narrow: bool = False) -> int:
    """Return how many of a parameter's numbers base + the factors' product rounds elsewhere than the graft does.

    Args:
        item: the parameter.
        made: its factors.
        narrow: the product is rounded to the base's dtype before it is added, as PEFT does for banks of experts.
    """
    total, product = 0, None
    _, rows, columns = item.members[0][0].region.matrix
    if any(isinstance(change, Shift) for change, _ in item.members):
        product = torch.zeros(item.weight.shape)
        for e, pairs in made.items():
            P, Q = torch.cat([p for p, _ in pairs], 1), torch.cat([q for _, q in pairs], 0)
            product.view(-1, rows, columns)[e] = P @ Q
    for change, s in item.members:
        before = item.before(change.region)
        added = item.difference(change, s) if product is None else change.region.to("cpu").read(product)
        added = added.to(before.dtype) if narrow else added
        total += int(
            ((before.to(added.dtype) + added).to(before.dtype) != item.after(change, s).to(before.dtype)).sum()
        )
    return total
