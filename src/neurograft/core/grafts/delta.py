"""Changes to one parameter: chosen entries, a low-rank product, or a parameter the base lacks.

All of them live in the coordinates of the base's checkpoint: its tensor names, full shapes and entry numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neurograft.core.grafts.coordinates import Piece, everything
from neurograft.core.grafts.replay import Replay
from neurograft.core.region import Layout, Region, as_matrix, positions, union


@dataclass(frozen=True)
class Slice:
    """New values for the entries of a region; a region of layout "all" is a dense change.

    Args:
        region: which entries.
        values: their new values, float32 (float64 for a float64 base), shaped `region.values_shape`.

    Example:
        >>> s = Slice(Region.of((2, 3), "rows", [1]), torch.ones(1, 3))
        >>> s.numel
        3
    """

    region: Region
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.region.shape

    @property
    def numel(self) -> int:
        """How many numbers change."""
        return self.region.numel

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that describe the change, for digests and files."""
        found = {"value": self.values}
        return found if self.region.layout == "all" else found | {self.region.layout: self.region.ids}

    def on(self, base: Tensor) -> Slice:
        """Return the change as a slice, given the base's tensor."""
        return self

    def at(self, piece: Piece) -> Slice:
        """Return the change, or the part of it that lies in a piece, where the piece lies."""
        return Slice(piece.region, piece.take(self.values))

    def after(self, before: Tensor) -> Tensor:
        """Return the new values, flat, of the region's numbers before."""
        return self.values.detach().to("cpu", before.dtype).reshape(-1)


class Shut(Slice):
    """Entries of a parameter set to 0: a slice without values of its own.

    A file holds a bit for each entry of the tensor, or the numbers of the shut ones, whichever is shorter.

    Args:
        region: which entries.

    Example:
        >>> shut = Shut(Region.of((2, 3), "flat", [0, 4]))
        >>> shut.values.tolist(), shut.numel, sorted(shut.tensors())
        ([0.0, 0.0], 2, ['flat'])
    """

    def __init__(self, region: Region) -> None:
        flat = region if region.layout == "flat" else region.flattened()[0]
        super().__init__(flat, torch.zeros(()).expand(flat.values_shape))  # one number, whatever the shape

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that describe the change."""
        return {"flat": self.region.ids}

    def after(self, before: Tensor) -> Tensor:
        """Return zeros, for the whole region or a part of it."""
        return torch.zeros_like(before)

    def at(self, piece: Piece) -> Shut:
        """Return the change, or the part of it that lies in a piece, where the piece lies."""
        return Shut(piece.region)


@dataclass(frozen=True)
class LowRank:
    """W + scale * B @ A.

    Args:
        shape: shape of the whole tensor, [out, in] (or [in, out] stored transposed, with `transposed`).
        A: lora_A, float32 [r, in].
        B: lora_B, float32 [out, r].
        scale: alpha / r.
        transposed: the checkpoint stores the weight as [in, out] (GPT-2's Conv1D).
    """

    shape: tuple[int, ...]
    A: Tensor
    B: Tensor
    scale: float
    transposed: bool = False

    @property
    def numel(self) -> int:
        """How many numbers describe the change."""
        return self.A.numel() + self.B.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that describe the change."""
        found = {"lora_A": self.A, "lora_B": self.B, "scale": torch.tensor(self.scale, dtype=torch.float64)}
        return found | {"transposed": torch.tensor(True)} if self.transposed else found  # of a square weight, say

    def product(self) -> Tensor:
        """Return scale * B @ A in the tensor's own orientation, float32 (float64 for float64 factors)."""
        work = torch.float64 if self.A.dtype == torch.float64 else torch.float32
        full = self.scale * (self.B.to(work) @ self.A.to(work))
        return (full.t() if self.transposed else full).reshape(self.shape)

    def on(self, base: Tensor) -> Slice:
        """Return the change as dense new values, base + product in float32 (float64 for a float64 base)."""
        wide = base.detach() if base.dtype == torch.float64 else base.detach().float()
        return Slice(everything(self.shape, as_matrix(self.shape)), wide + self.product().to(base.device))


@dataclass(frozen=True)
class Shift:
    """A low-rank change on one parameter, kept as its factors; dense only while numbers are rewritten.

    Args:
        low: the change in the checkpoint's coordinates.
        piece: where its entries, or some of them, lie in the parameter.
    """

    low: LowRank
    piece: Piece

    @property
    def region(self) -> Region:
        """The parameter's entries that change."""
        return self.piece.region

    def after(self, before: Tensor) -> Tensor:
        """Return the new values, flat, of the region's numbers before."""
        return before + self.piece.take(self.low.product()).reshape(-1).to(before.dtype)


@dataclass(frozen=True)
class New:
    """A parameter, or rows appended to one, that the base's checkpoint lacks: shipped whole, in no fingerprint.

    Args:
        values: the whole parameter, or the appended rows.
        after: for appended rows (new tokens), how many rows the base has; None for a whole parameter.
    """

    values: Tensor
    after: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the changed model."""
        first = len(self.values) + (self.after or 0)
        return (first, *self.values.shape[1:]) if self.values.dim() else ()

    @property
    def numel(self) -> int:
        """How many numbers are shipped."""
        return self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that describe the change."""
        return {"added": self.values}

    def on(self) -> Slice:
        """Return the change as a slice of the changed model's tensor."""
        if self.after is None:
            return Slice(everything(self.shape, as_matrix(self.shape)), self.values)
        rows = torch.arange(self.after, self.shape[0])
        layout: Layout = "rows" if self.values.dim() > 1 else "flat"
        return Slice(Region.of(self.shape, layout, rows), self.values)


Delta = Slice | LowRank | New | Replay


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


def narrowed(delta: Slice, keep: Tensor) -> Slice:
    """Return the slice with only some of its ids (positions in `region.ids`)."""
    region = replace(delta.region, ids=delta.region.ids[keep])
    return Shut(region) if isinstance(delta, Shut) else Slice(region, delta.values[keep])
