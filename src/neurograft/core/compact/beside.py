"""Live weights that are never written: every use adds what the trained values differ from the weight.

Every operation known to `core.compact.uses` is linear in its weight, so op(x, W + D) = op(x, W) + op(x, D). The
weight keeps the base's numbers, the operation runs on them as it is, and D is never built as a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurograft.core.compact.live import Live, Plain
from neurograft.core.region import Region, positions, union


class Beside(Live):
    """The trainable side of a weight that keeps the base's numbers.

    Who reads the weight (`state_dict`, `detach`, `.data`) sees the base; an operation computes as if the weight
    held theta in the region.
    """

    @property
    def trained(self) -> tuple[Region, Tensor]:
        """Which entries theta holds, and what the base holds there."""
        return self.region, self.original

    @property
    def beside(self) -> bool:
        """Say that uses add the difference, unless it is left out for a moment."""
        return not self.resting

    def write(self) -> None:
        """Nothing to write: the weight is left alone."""

    def restore(self) -> None:
        """Nothing to put back."""

    def reload(self) -> None:
        """Take what somebody else wrote into the weight for the base; the values stay."""
        with Plain():
            self.original = self.region.read(self.weight)
        self.seen = self.weight._version

    def may_be_dense(self, free: bool = False) -> bool:
        """Say whether the whole weight may be built for an operation; without gradients nothing of it stays."""
        return super().may_be_dense(free) or not torch.is_grad_enabled()

    def dense(self) -> Tensor:
        """Return the weight with the values in it, a copy, for operations that are not linear in it or not known."""
        if self.resting:
            return super().dense()
        values = self.source().to(self.weight.dtype, copy=True)
        if self.region.layout == "all":
            return values.view(self.weight.shape)
        flat = self.weight.detach().reshape(-1)
        return flat.index_copy(0, self.region.flat(), values.reshape(-1)).view(self.weight.shape)

    def copied(self) -> Tensor:
        """Return a copy of the whole weight with the current values."""
        with Plain(), torch.no_grad():
            return self.dense().detach().clone()


class Left(Beside):
    """Entries that were trained and were left behind: every use goes on adding them, and they do not move.

    Args:
        name: the parameter's module name.
        weight: the frozen parameter.
        region: which of its entries.
        values: what they were left with, in the order of the region.
    """

    def __init__(self, name: str, weight: nn.Parameter, region: Region, values: Tensor) -> None:
        super().__init__(name, weight, region)
        self.theta = values.to(self.theta)  # type: ignore[assignment]  # a plain tensor: no optimizer's


class Onward(Beside):
    """The trainable side of a weight of which other entries were trained before and left behind.

    Uses add both; `region` and `original` are of both. Entries that return go on from the values they were left with.

    Args:
        name: the parameter's module name.
        weight: the frozen parameter.
        region: which of its entries theta holds.
        left: the ones left behind; may overlap.
        values: what these were left with.
        allow_dense: accept a dense gradient where an operation is not known.
    """

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        region: Region,
        left: Region,
        values: Tensor,
        *,
        allow_dense: bool = False,
    ) -> None:
        both = union([left, region])
        super().__init__(name, weight, both, allow_dense=allow_dense)
        held = self.theta.detach()
        held.view(-1)[positions(left, both).to(held.device)] = values.reshape(-1).to(held)
        self.held, self.own, self.at = held, region.to(held.device), positions(region, both).to(held.device)
        self.theta = nn.Parameter(held.view(-1)[self.at].view(region.values_shape))

    @property
    def trained(self) -> tuple[Region, Tensor]:
        """Which entries theta holds, and what the base holds there."""
        return self.own, self.original.reshape(-1)[self.at].view(self.own.values_shape)

    def source(self) -> Tensor:
        """Return all entries that may differ from the base, shaped as those of `region`; theta's have a gradient."""
        return self.held.view(-1).index_copy(0, self.at, self.theta.reshape(-1)).view(self.held.shape)

    def numbers(self) -> Tensor:
        """Return all entries that may differ from the base, as plain numbers."""
        return self.source().detach()

    def moved(self, device: torch.device) -> None:
        """Follow the weight to another device."""
        super().moved(device)
        self.held, self.own, self.at = self.held.to(device), self.own.to(device), self.at.to(device)
