"""A neuron with active dendrites: it fires when one of its segments does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.networks.dendritic_segment import DendriticSegment


@method(paper="sdr-dendrites")
def dendritic_neuron(n: int, **options: Any) -> DendriticNeuron:
    """Return a `DendriticNeuron`."""
    return DendriticNeuron(n, **options)


class DendriticNeuron(nn.Module):
    """Several `DendriticSegment` joined by or.

    Args:
        n: cells.
        segments: how many.
        s: synapses for each stored code.
        theta: threshold of every segment.
        straight_through: as for a segment.

    Example:
        >>> net, codes = DendriticNeuron(8, segments=2, s=3, theta=3), torch.eye(2).repeat_interleave(4, 1)
        >>> net.store(codes, torch.Generator().manual_seed(0))
        >>> net(codes).tolist(), net(codes * torch.tensor([1, 0] * 4)).tolist()
        ([True, True], [False, False])
    """

    def __init__(
        self, n: int, *, segments: int = 1, s: int = 20, theta: int = 8, straight_through: bool = False
    ) -> None:
        super().__init__()
        if segments < 1:
            raise RequestError(f"segments={segments}", expected="at least one", do="give segments=1")
        self.n, self.s, self.straight_through = n, s, straight_through
        self.segments = nn.ModuleList(
            DendriticSegment(n, s=s, theta=theta, straight_through=straight_through) for _ in range(segments)
        )

    def each(self) -> list[DendriticSegment]:
        """Return the segments."""
        return [segment for segment in self.segments if isinstance(segment, DendriticSegment)]

    @torch.no_grad()
    def set_theta(self, theta: int) -> None:
        """Give every segment a threshold.

        Raises:
            RequestError: it is out of reach.
        """
        if not 1 <= theta <= self.s:
            raise RequestError(f"theta={theta} with s={self.s}", expected=f"1 to {self.s}", do="lower the threshold")
        for segment in self.each():
            segment.theta.fill_(float(theta))

    def store(self, codes: Tensor, rng: torch.Generator) -> None:
        """Store codes [P, n], one after another on the segments in turn, so that each holds about P / segments."""
        segments = self.each()
        for i, code in enumerate(codes):
            segments[i % len(segments)].store(code, rng)

    def overlaps(self, codes: Tensor) -> Tensor:
        """Return the overlap of codes [..., n] with each segment, float [..., segments]."""
        return torch.stack([segment.overlap(codes) for segment in self.each()], -1)

    def forward(self, codes: Tensor) -> Tensor:
        """Return which codes [..., n] are recognised: bool [...], or 0.0 and 1.0 with a gradient.

        The gradient goes to the segment that is nearest to its threshold, or farthest above it.
        """
        answers = torch.stack([segment(codes) for segment in self.each()], -1)
        if not self.straight_through:
            return answers.any(-1)
        thetas = torch.stack([segment.theta for segment in self.each()])
        first = (self.overlaps(codes).detach() - thetas).argmax(-1, keepdim=True)
        return answers.gather(-1, first)[..., 0]
