"""Several changes of the same entries: the numbers they make together, and those of one that does what they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurograft.core.grafts.delta import Shift, Shut, Slice
from neurograft.core.overlap import meeting
from neurograft.core.region import Region, union

Change = Slice | Shift
Changes = Sequence[tuple[Change, float]]  # with their strength


def combined(region: Region, original: Tensor, members: Changes) -> Tensor:
    """Return the numbers of `region` under several scaled changes, before rounding to the base's dtype.

    A number touched by one unscaled change is that change's value, and one that several unscaled `Shut` set to 0 counts
    as set once; any other is `original + sum of s * (value - original)` in float32, in the order given. Costs as much
    as the region has entries, whatever else the changes touch.

    Args:
        region: the entries; the changes may touch others too, and need not touch all of these.
        original: the base's numbers, shaped `region.values_shape`, on the CPU.
        members: (change, s), in order of digest.

    Example:
        >>> r = Region.of((3,), "flat", [0, 1])
        >>> one = Slice(Region.of((3,), "flat", [0]), torch.tensor([5.0]))
        >>> two = Slice(r, torch.tensor([2.0, 2.0]))
        >>> combined(r, torch.tensor([1.0, 1.0]), [(one, 1.0), (two, 0.5)]).tolist()
        [5.5, 1.5]
    """
    return _sum(region, original, members)[0]


def rounded(region: Region, original: Tensor, members: Changes) -> Tensor:
    """Return what `combined` does in the dtype of the originals, whose bits stand where no change touches.

    Example:
        >>> r = Region.of((2,), "flat", [0, 1])
        >>> one = Slice(Region.of((2,), "flat", [0]), torch.tensor([5.001]))
        >>> rounded(r, torch.tensor([1.0, 1.0]).bfloat16(), [(one, 1.0)]).tolist()
        [5.0, 1.0]
    """
    numbers, count = _sum(region, original, members)
    if count is None:
        return numbers.to(original.dtype)
    return torch.where(count.view(original.shape) > 0, numbers.to(original.dtype), original)


def _sum(region: Region, original: Tensor, members: Changes) -> tuple[Tensor, Tensor | None]:
    """Return the numbers, and how many changes each has (2 if its one is scaled); None if all of them have one."""
    base = original.to(torch.float64 if original.dtype == torch.float64 else torch.float32).reshape(-1)
    met = [(change, s, *meeting(region, change.region)) for change, s in members]
    met = [m for m in met if isinstance(m[2], slice) or len(m[2])]
    if len(met) == 1 and met[0][1] == 1.0 and isinstance(met[0][2], slice):
        change, _, mine, theirs, run = met[0]
        return change.after(base.view(-1, run), theirs).reshape(region.values_shape), None
    total, exact, count = base.clone(), base.clone(), torch.zeros(len(base), dtype=torch.uint8)
    shut = torch.zeros(len(base), dtype=torch.bool)
    for change, s, mine, theirs, run in met:
        if isinstance(change, Shut) and s == 1.0:
            fresh = torch.zeros_like(shut)
            fresh.view(-1, run)[mine] = True
            mine, theirs, run, shut = (fresh & ~shut).nonzero().reshape(-1), slice(None), 1, shut | fresh
        before, touched = base.view(-1, run)[mine], count.view(-1, run)
        values = change.after(before, theirs)
        total.view(-1, run)[mine] += s * (values - before)
        exact.view(-1, run)[mine] = values
        touched[mine] = (touched[mine] + (1 if s == 1.0 else 2)).clamp_(max=2)
    return torch.where(count <= 1, exact, total).reshape(region.values_shape), count


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
        return region.to("cpu").read(numbers.reshape(under.shape)).to(values.dtype)
    mine, theirs, run = meeting(region, under)
    values.view(-1, run)[mine] = numbers.to(values.dtype).reshape(-1, run)[theirs]
    return values


def merged(members: list[tuple[Slice, float]], originals: Tensor | None, region: Region | None = None) -> Slice:
    """Return one slice that equals several scaled ones; `originals` may be None where nothing overlaps."""
    region = region or union(change.region for change, _ in members)
    if all(isinstance(change, Shut) and s == 1.0 for change, s in members):
        return Shut(region)
    if originals is None:
        wide = any(change.values.dtype == torch.float64 for change, _ in members)
        originals = torch.zeros(region.values_shape, dtype=torch.float64 if wide else torch.float32)
    return Slice(region, combined(region, originals, members))
