"""Changes to one parameter: chosen entries, a low-rank product, or a parameter the base lacks.

All of them live in the coordinates of the base's checkpoint: its tensor names, full shapes and entry numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
        return {"lora_A": self.A, "lora_B": self.B, "scale": torch.tensor(self.scale, dtype=torch.float64)}

    def product(self) -> Tensor:
        """Return scale * B @ A in the tensor's own orientation, float32."""
        full = self.scale * (self.B.float() @ self.A.float())
        return (full.t() if self.transposed else full).reshape(self.shape)

    def on(self, base: Tensor) -> Slice:
        """Return the change as dense new values, base + product in float32."""
        region = Region(self.shape, as_matrix(self.shape), "all", torch.empty(0, dtype=torch.int64))
        return Slice(region, base.detach().float() + self.product().to(base.device))


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

    def on(self, base: Tensor) -> Slice:
        """Return the change as a slice of the changed model's tensor."""
        if self.after is None:
            region = Region(self.shape, as_matrix(self.shape), "all", torch.empty(0, dtype=torch.int64))
            return Slice(region, self.values)
        rows = torch.arange(self.after, self.shape[0])
        layout: Layout = "rows" if self.values.dim() > 1 else "flat"
        return Slice(Region.of(self.shape, layout, rows), self.values)


Delta = Slice | LowRank | New


def combined(region: Region, original: Tensor, members: list[tuple[Slice, float]]) -> Tensor:
    """Return the numbers of `region` under several scaled changes, before rounding to the base's dtype.

    A number touched by one unscaled change is that change's value; any other is
    `original + sum of s * (value - original)` in float32, in the order given.

    Args:
        region: holds every member's entries.
        original: the base's numbers, shaped `region.values_shape`.
        members: (change, s), in order of digest.

    Example:
        >>> r = Region.of((3,), "flat", [0, 1])
        >>> one = Slice(Region.of((3,), "flat", [0]), torch.tensor([5.0]))
        >>> two = Slice(r, torch.tensor([2.0, 2.0]))
        >>> combined(r, torch.tensor([1.0, 1.0]), [(one, 1.0), (two, 0.5)]).tolist()
        [5.5, 1.5]
    """
    work = torch.float64 if original.dtype == torch.float64 else torch.float32
    base = original.to(work).reshape(-1)
    total, exact, count = base.clone(), base.clone(), torch.zeros(len(base), dtype=torch.int16)
    for change, s in members:
        where = positions(change.region, region)
        values = change.values.to("cpu", work).reshape(-1)
        total[where] += s * (values - base[where])
        exact[where] = values
        count[where] += 1 if s == 1.0 else 2
    return torch.where(count <= 1, exact, total).reshape(region.values_shape)


def merged(members: list[tuple[Slice, float]], originals: Tensor | None, region: Region | None = None) -> Slice:
    """Return one slice that equals several scaled ones; `originals` may be None where nothing overlaps."""
    region = region or union(change.region for change, _ in members)
    if originals is None:
        originals = torch.zeros(region.values_shape)
    return Slice(region, combined(region, originals, members))


def narrowed(delta: Slice, keep: Tensor) -> Slice:
    """Return the slice with only some of its ids (positions in `region.ids`)."""
    region = replace(delta.region, ids=delta.region.ids[keep])
    return Slice(region, delta.values[keep])
