"""Live weights whose entries move in groups: the units of a group share one trained vector.

Shape letters: m live rows (or columns, or single entries) of a weight, K groups, C numbers in each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurograft.core.compact.beside import Beside
from neurograft.core.compact.live import Live, Plain
from neurograft.core.errors import RunError
from neurograft.core.region import Region


class Tied(Live):
    """The trainable side of a weight whose live rows are base + theta[group].

    Args:
        name: the parameter's module name.
        weight: the frozen parameter.
        region: which of its entries move; its first axis is tied.
        groups: int64 [m], the group of each row, 0 to K - 1.
        allow_dense: accept a dense gradient where an operation is not known.
    """

    def __init__(
        self, name: str, weight: nn.Parameter, region: Region, groups: Tensor, *, allow_dense: bool = False
    ) -> None:
        super().__init__(name, weight, region, allow_dense=allow_dense)
        self.base, self.groups = self.theta.detach(), groups.to(weight.device)
        self.theta = nn.Parameter(self.base.new_zeros(int(groups.max()) + 1, *self.base.shape[1:]))

    def source(self) -> Tensor:
        """Return the live entries, [m, C]; the gradient of a vector is the sum of its rows'."""
        return self.base + self.theta.index_select(0, self.groups)

    def numbers(self) -> Tensor:
        """Return the live entries, [m, C], as plain numbers."""
        return self.source().detach()

    def reload(self) -> None:
        """Take over what somebody else wrote into the weight.

        Raises:
            RunError: the rows of a group did not move alike.
        """
        with Plain():
            now = self.region.read(self.weight)
            total = torch.zeros_like(self.theta).index_add_(0, self.groups, now.to(self.base) - self.base)
            count = torch.bincount(self.groups).to(total).reshape(-1, *[1] * (total.dim() - 1))
            self.theta.data.copy_(total / count)
            if not torch.allclose(self.numbers().to(now.dtype), now, rtol=1e-2 if now.dtype != torch.float32 else 1e-4):
                raise RunError(
                    f"numbers were written into {self.name} that its tied rows cannot hold; "
                    "detach before loading other weights"
                )
        self.seen = self.weight._version

    def moved(self, device: torch.device) -> None:
        """Follow the weight to another device."""
        super().moved(device)
        self.base, self.groups = self.base.to(device), self.groups.to(device)


class TiedBeside(Beside, Tied):
    """`Tied` for a weight that is never written: every use adds the vectors of its rows' groups."""

    def reload(self) -> None:
        """Take what somebody else wrote into the weight for the base; the vectors stay."""
        super().reload()
        self.base = self.original.to(self.base)
