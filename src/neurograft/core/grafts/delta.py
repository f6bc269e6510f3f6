"""Changes to one parameter: chosen entries, a low-rank product, a log of seeds, or a parameter the base lacks.

All of them live in the coordinates of the base's checkpoint: its tensor names, full shapes and entry numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurograft.core.grafts.coordinates import Piece, everything
from neurograft.core.grafts.replay import Replay
from neurograft.core.grafts.slices import Shut, Slice
from neurograft.core.overlap import Index
from neurograft.core.region import Layout, Region, as_matrix

__all__ = [
    "Delta",
    "LowRank",
    "New",
    "Replay",
    "Shift",
    "Shut",
    "Slice",
]  # every kind there is


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

    def after(self, before: Tensor, at: Index) -> Tensor:
        """Return new values, [k, run]: those of the runs `at` of the region's values, whose numbers were `before`."""
        return before + self.piece.take(self.low.product()).reshape(-1, before.shape[1])[at].to(before.dtype)


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
