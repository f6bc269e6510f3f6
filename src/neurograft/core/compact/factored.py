"""Live weights whose entries move by a low-rank product: LoRA inside a block of rows.

Shape letters: m live rows (or columns) of a weight, C numbers in each, r the rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurograft.core.compact.live import Live, Plain
from neurograft.core.errors import RunError
from neurograft.core.region import Region


class Factored(Live):
    """The trainable side of a weight whose live rows are base + scale * A B.

    Both factors are one tensor, A [m, r] above B^T [C, r]: A begins at 0, so that nothing changes at the start.

    Args:
        name: the parameter's module name.
        weight: the frozen parameter.
        region: which of its entries move; its values are [m, C].
        rank: r.
        scale: of the product.
        rng: draws B, uniform within 1 / sqrt(C) of 0, as LoRA does.
        allow_dense: accept a dense gradient where an operation is not known.
    """

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        region: Region,
        *,
        rank: int,
        scale: float,
        rng: torch.Generator,
        allow_dense: bool = False,
    ) -> None:
        super().__init__(name, weight, region, allow_dense=allow_dense)
        self.base, self.scale = self.theta.detach(), scale
        self.m, wide = self.base.shape
        drawn = (2 * torch.rand(wide, rank, generator=rng, dtype=torch.float64) - 1) / wide**0.5
        self.theta = nn.Parameter(torch.cat([torch.zeros(self.m, rank), drawn]).to(self.base))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [m, r] and B [r, C]."""
        return self.theta[: self.m], self.theta[self.m :].t()

    def source(self) -> Tensor:
        """Return the live entries, [m, C], in the graph."""
        a, b = self.factors()
        return self.base + self.scale * (a @ b)

    def numbers(self) -> Tensor:
        """Return the live entries, [m, C], as plain numbers."""
        return self.source().detach()

    def reload(self) -> None:
        """Accept what somebody else wrote into the weight, if it is what the factors say already.

        Raises:
            RunError: it is something else, which has no factors.
        """
        with Plain():
            now, mine = self.region.read(self.weight), self.numbers()
            if not torch.allclose(
                mine.to(now.dtype), now, rtol=1e-2 if now.dtype != torch.float32 else 1e-4, atol=1e-6
            ):
                raise RunError(
                    f"numbers were written into {self.name}, of which only a low-rank change is trained; "
                    "detach before loading other weights"
                )
        self.seen = self.weight._version

    def moved(self, device: torch.device) -> None:
        """Follow the weight to another device."""
        super().moved(device)
        self.base = self.base.to(device)
