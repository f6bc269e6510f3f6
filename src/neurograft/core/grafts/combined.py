"""Several changes of the same entries: the numbers they make together, and those of one that does what they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurograft.core.grafts.delta import Shift, Shut, Slice
from neurograft.core.region import Region, positions, union


def combined(region: Region, original: Tensor, members: Sequence[tuple[Slice | Shift, float]]) -> Tensor:
    """Return the numbers of `region` under several scaled changes, before rounding to the base's dtype.

    A number touched by one unscaled change is that change's value, and one that several unscaled `Shut` set to 0 counts
    as set once; any other is `original + sum of s * (value - original)` in float32, in the order given.

    Args:
        region: holds every member's entries.
        original: the base's numbers, shaped `region.values_shape`, on the CPU.
        members: (change, s), in order of digest.

    Example:
        >>> r = Region.of((3,), "flat", [0, 1])
        >>> one = Slice(Region.of((3,), "flat", [0]), torch.tensor([5.0]))
        >>> two = Slice(r, torch.tensor([2.0, 2.0]))
        >>> combined(r, torch.tensor([1.0, 1.0]), [(one, 1.0), (two, 0.5)]).tolist()
        [5.5, 1.5]
    """
    base = original.to(torch.float64 if original.dtype == torch.float64 else torch.float32).reshape(-1)
    places = [_place(change.region, region) for change, _ in members]
    if len(members) == 1 and members[0][1] == 1.0 and isinstance(places[0], slice):
        return members[0][0].after(base).reshape(region.values_shape)
    total, exact, count = base.clone(), base.clone(), torch.zeros(len(base), dtype=torch.uint8)
    shut = torch.zeros(len(base), dtype=torch.bool)
    for (change, s), where in zip(members, places):
        if isinstance(change, Shut) and s == 1.0:
            fresh = torch.zeros_like(shut)
            fresh[where] = True
            where, shut = (fresh & ~shut).nonzero().reshape(-1), shut | fresh
        before = base[where]
        values = change.after(before)
        total[where] += s * (values - before)
        exact[where] = values
        count[where] = (count[where] + (1 if s == 1.0 else 2)).clamp_(max=2)
    return torch.where(count <= 1, exact, total).reshape(region.values_shape)


def _place(inner: Region, outer: Region) -> Tensor | slice:
    same = inner.layout == outer.layout and inner.block == outer.block and torch.equal(inner.ids, outer.ids.cpu())
    return slice(None) if same else positions(inner, outer)


def patched(region: Region, values: Tensor, under: Region, numbers: Tensor) -> Tensor:
    """Replace, among the values of a region, those that `under` holds too by its numbers; in place, on the CPU.

    Example:
        >>> rows = Region.of((3, 2), "rows", [0, 2])
        >>> patched(rows, torch.zeros(2, 2), Region.of((3, 2), "cols", [1]), torch.tensor([[7.0, 8.0, 9.0]])).tolist()
        [[0.0, 7.0], [0.0, 9.0]]
    """
    if region.layout == "all":
        under.to("cpu").write_(values, numbers)
        return values
    if under.layout == "all":
        return region.to("cpu").read(numbers.reshape(under.shape))
    if region.layout == under.layout and region.block == under.block:
        mine, theirs, width = region.ids.cpu(), under.ids.cpu(), values.shape[1:]
    else:
        mine, theirs, width = region.flat().cpu(), under.flat().cpu(), torch.Size()
    theirs, order = theirs.sort()
    held = torch.isin(mine, theirs).nonzero().reshape(-1)
    chosen = order[torch.searchsorted(theirs, mine[held])]
    values.view(-1, *width)[held] = numbers.to(values.dtype).reshape(-1, *width)[chosen]
    return values


def merged(members: list[tuple[Slice, float]], originals: Tensor | None, region: Region | None = None) -> Slice:
    """Return one slice that equals several scaled ones; `originals` may be None where nothing overlaps."""
    region = region or union(change.region for change, _ in members)
    if all(isinstance(change, Shut) and s == 1.0 for change, s in members):
        return Shut(region)
    if originals is None:
        originals = torch.zeros(region.values_shape)
    return Slice(region, combined(region, originals, members))
