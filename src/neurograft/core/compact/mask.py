"""Masks that are learned: x = off + m * (on - off), with m in [0, 1] a function of trained numbers s.

| shape | m | start of s | used for |
|---|---|---|---|
| straight | [s > at], its gradient passed on as if m were s | 2 at | masks of one bit a weight |
| flip | sigmoid(s - at), flipped where the patch is set | uniform in [0, 1) | a patch whose bits may flip |
| clamp | s, brought back into [0, 1] after each step | 1 | all of a change at the start, a loss that takes away |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import one_of

SHAPES = ("straight", "flip", "clamp")


@dataclass(frozen=True)
class Mask:
    """How a mask depends on what is trained.

    Args:
        shape: see the table above.
        at: the threshold of "straight", the offset of "flip".

    Raises:
        RequestError: an unknown shape.

    Example:
        >>> s = torch.tensor([0.0, 0.02])
        >>> Mask("straight", 0.005).soft(s).tolist(), Mask("clamp").hard(s + 0.49).tolist()
        ([0.0, 1.0], [False, True])
    """

    shape: str = "straight"
    at: float = 5e-3

    def __post_init__(self) -> None:
        one_of(self.shape, SHAPES, what="shape of a mask")

    def start(self, like: Tensor, rng: torch.Generator) -> Tensor:
        """Return the numbers a training begins with, shaped like a tensor."""
        if self.shape == "flip":
            return torch.rand(like.shape, generator=rng, dtype=torch.float64).to(like)
        return torch.full_like(like, 2 * self.at if self.shape == "straight" else 1.0)

    def soft(self, s: Tensor, patch: Tensor | None = None) -> Tensor:
        """Return m, differentiable.

        Args:
            s: the trained numbers.
            patch: bool, like s: the bits that "flip" begins with; none set if None.
        """
        if self.shape == "straight":
            found: Tensor = _Straight.apply(s, self.at)
            return found
        if self.shape == "clamp":
            return s
        flipped = torch.sigmoid(s - self.at)
        return flipped if patch is None else torch.where(patch, 1 - flipped, flipped)

    @torch.no_grad()
    def hard(self, s: Tensor, patch: Tensor | None = None) -> Tensor:
        """Return m rounded, bool; halves round down."""
        return self.soft(s, patch) > 0.5

    @torch.no_grad()
    def hold_(self, s: Tensor) -> None:
        """Bring s back to where the mask is defined, in place: after each step."""
        if self.shape == "clamp":
            s.clamp_(0.0, 1.0)

    def pulled(self, s: Tensor, pull: Tensor, patch: Tensor | None = None) -> Tensor:
        """Return the gradient of s from that of m, both shaped like s.

        Example:
            >>> Mask("flip", 0.0).pulled(torch.tensor([0.0]), torch.tensor([4.0])).tolist()
            [1.0]
        """
        with torch.enable_grad():
            leaf = s.detach().requires_grad_(True)
            (found,) = torch.autograd.grad(self.soft(leaf, patch), leaf, pull)
        return found


class _Straight(torch.autograd.Function):
    """[s > at] forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, at: float) -> Tensor:
        return (s > at).to(s.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None
