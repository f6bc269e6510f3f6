"""Live weights that are never written: every use adds what the trained values differ from the weight.

Every operation known to `core.compact.uses` is linear in its weight, so op(x, W + D) = op(x, W) + op(x, D). The
weight keeps the base's numbers, the operation runs on them as it is, and D is never built as a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.compact.live import Live, Plain


class Beside(Live):
    """The trainable side of a weight that keeps the base's numbers.

    Who reads the weight (`state_dict`, `detach`, `.data`) sees the base; an operation computes as if the weight
    held theta in the region.
    """

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
        values = self.theta.to(self.weight.dtype, copy=True)
        if self.region.layout == "all":
            return values.view(self.weight.shape)
        flat = self.weight.detach().reshape(-1)
        return flat.index_copy(0, self.region.flat(), values.reshape(-1)).view(self.weight.shape)

    def copied(self) -> Tensor:
        """Return a copy of the whole weight with the current values."""
        with Plain(), torch.no_grad():
            return self.dense().detach().clone()
