"""Gaussian noise that is never kept: any chunk of it is drawn again from a seed and a name.

The two uses, looking at shifted numbers and moving numbers for good, are the whole of zeroth-order training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurograft.core.seeds import generator

LEAST, SHARE = 1 << 16, 1 << 10


def grain(total: int) -> int:
    """Return how many numbers are drawn at a time for a model of `total` numbers: under a thousandth of it.

    Example:
        >>> grain(1000), grain(1 << 30)
        (65536, 1048576)
    """
    return max(LEAST, total // SHARE)


@dataclass(frozen=True)
class Stream:
    """The noise of one tensor, in chunks of whole rows; each chunk has a generator of its own.

    Args:
        name: streams of different names share nothing, whatever their shapes.
        shape: shape of the tensor.
        grain: numbers in a chunk, at most, if a row is not longer.

    Example:
        >>> [(lo, hi) for _, lo, hi in Stream("w", (5, 2), 4).chunks()]
        [(0, 4), (4, 8), (8, 10)]
    """

    name: str
    shape: tuple[int, ...]
    grain: int

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Rows in a chunk."""
        return max(1, self.grain // max(1, self.width))

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, first and last + 1 flat entry of every chunk."""
        size, total = self.rows * self.width, math.prod(self.shape)
        for number, lo in enumerate(range(0, total, max(1, size))):
            yield number, lo, min(lo + size, total)

    def draw(self, seed: int, chunk: int, count: int, device: torch.device) -> Tensor:
        """Return the `count` numbers of a chunk, N(0, 1) in float32."""
        return torch.randn(count, generator=generator(seed, self.name, chunk, device=device), device=device)

    def moved(
        self, flat: Tensor, chunk: int, lo: int, hi: int, terms: Sequence[tuple[int, float]], keep: float = 1.0
    ) -> Tensor:
        """Return the numbers lo to hi of a flat tensor, times `keep`, plus the sum of scale * z(seed).

        They are float32, or float64 for a float64 tensor.
        """
        work = torch.float64 if flat.dtype == torch.float64 else torch.float32
        wide = flat[lo:hi].detach().to(work, copy=True).mul_(keep)
        for seed, scale in terms:
            wide.add_(self.draw(seed, chunk, hi - lo, flat.device), alpha=scale)
        return wide

    def advance_(self, flat: Tensor, terms: Sequence[tuple[int, float]], *, keep: float = 1.0) -> None:
        """Move a flat tensor for good: times `keep`, plus the sum of scale * z(seed), rounded once to its dtype.

        Training and replay both go through here, so that they make the same bytes.
        """
        for chunk, lo, hi in self.chunks():
            flat[lo:hi].copy_(self.moved(flat, chunk, lo, hi, terms, keep))


def device_kind(device: torch.device | str) -> str:
    """Return what a device's random numbers and rounding depend on: its type and instruction set or model."""
    device = torch.device(device)
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
