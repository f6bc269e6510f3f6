"""A dendritic segment: a few synapses and a threshold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.compact.mask import Mask
from neurograft.core.errors import RequestError

CONNECTED = Mask("straight", 0.5)


@method(paper="sdr-dendrites")
def dendritic_segment(n: int, **options: Any) -> DendriticSegment:
    """Return a `DendriticSegment`."""
    return DendriticSegment(n, **options)


class DendriticSegment(nn.Module):
    """Fire when theta or more of the connected cells are active at once.

    A cell is connected where its `permanence` is above one half; storing a code sets it to 1 for s of the code's
    active cells, so that several codes may be mixed on one segment.

    Args:
        n: cells that it may connect to.
        s: synapses for each stored code.
        theta: the threshold.
        straight_through: answer in numbers that training can go through: 0 or 1 forwards; backwards, a permanence
            moves as if it were the synapse, and the step as if it were sigmoid(overlap - theta + 1/2).

    Raises:
        RequestError: more synapses than cells, or a threshold out of reach.

    Example:
        >>> net, code = DendriticSegment(6, s=3, theta=2), torch.tensor([1, 1, 1, 0, 0, 0])
        >>> net.store(code, torch.Generator().manual_seed(0))
        >>> net(torch.stack([code, 1 - code])).tolist()
        [True, False]
    """

    def __init__(self, n: int, *, s: int = 20, theta: int = 8, straight_through: bool = False) -> None:
        super().__init__()
        if not 1 <= theta <= s <= n:
            raise RequestError(
                f"n={n}, s={s}, theta={theta}",
                expected="1 <= theta <= s <= n",
                do="take fewer synapses, or a lower theta",
            )
        self.n, self.s, self.straight_through = n, s, straight_through
        self.permanence = nn.Parameter(torch.zeros(n), requires_grad=straight_through)
        self.theta = nn.Parameter(torch.tensor(float(theta)), requires_grad=False)

    @property
    def synapses(self) -> Tensor:
        """Which cells are connected, bool [n]."""
        return CONNECTED.hard(self.permanence.detach())

    @torch.no_grad()
    def store(self, code: Tensor, rng: torch.Generator) -> None:
        """Connect s random active cells of a code, 0 or 1 [n], beside those connected already.

        Raises:
            RequestError: it has fewer active cells.
        """
        active = code.reshape(-1).nonzero().reshape(-1).cpu()
        if code.numel() != self.n or len(active) < self.s:
            raise RequestError(
                f"a code of {code.numel()} cells, {len(active)} of them active",
                expected=f"{self.n} cells, at least s={self.s} active",
                do="make the network for these codes: n= their width, s= at most their active cells",
            )
        chosen = active[torch.randperm(len(active), generator=rng)[: self.s]]
        self.permanence[chosen.to(self.permanence.device)] = 1.0

    def overlap(self, codes: Tensor) -> Tensor:
        """Return how many connected cells are active in codes [..., n], float [...]."""
        connected = CONNECTED.soft(self.permanence) if self.straight_through else self.synapses
        return codes.to(self.permanence.dtype) @ connected.to(self.permanence.dtype)

    def forward(self, codes: Tensor) -> Tensor:
        """Return which codes [..., n] are recognised: bool [...], or 0.0 and 1.0 with a gradient."""
        return fired(self.overlap(codes), self.theta, straight_through=self.straight_through)


def fired(overlap: Tensor, theta: Tensor, *, straight_through: bool) -> Tensor:
    """Return where an overlap reaches theta, as bool, or as 0.0 and 1.0 with the gradient of a sigmoid."""
    hard = overlap >= theta
    if not straight_through:
        return hard
    soft = torch.sigmoid(overlap - theta + 0.5)
    return soft + (hard.to(soft) - soft).detach()
