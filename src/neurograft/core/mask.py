"""Masks that are learned: x = off + m * (on - off), with m in [0, 1] a function of trained numbers s.

| shape | m | start of s | used for |
|---|---|---|---|
| straight | [s > at], its gradient passed on as if m were s | 2 at | masks of one bit a weight |
| flip | sigmoid(s - at), flipped where the patch is set | uniform in [0, 1) | a patch whose bits may flip |
| clamp | s, brought back into [0, 1] after each step | 1 | masks over activations |
| log | exp(s) | 0 | descent on the logarithm of a scale |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RequestError, one_of

SHAPES = ("straight", "flip", "clamp", "log")


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
        return torch.full_like(like, {"straight": 2 * self.at, "clamp": 1.0, "log": 0.0}[self.shape])

    def soft(self, s: Tensor, patch: Tensor | None = None) -> Tensor:
        """Return m, differentiable.

        Args:
            s: the trained numbers.
            patch: bool, like s: the bits that "flip" begins with; none set if None.
        """
        if self.shape == "straight":
            found: Tensor = _Straight.apply(s, self.at)
            return found
        if self.shape == "flip":
            flipped = torch.sigmoid(s - self.at)
            return flipped if patch is None else torch.where(patch, 1 - flipped, flipped)
        return s if self.shape == "clamp" else s.exp()

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
            >>> Mask("log").pulled(torch.tensor([0.0]), torch.tensor([3.0])).tolist()
            [3.0]
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


def descend(masks: dict[str, Tensor], mask: Mask, lr: float, optimizer: str = "SGD") -> torch.optim.Optimizer:
    """Return an optimizer of trained numbers that keeps them where their mask is defined.

    Args:
        masks: the trained numbers by name; they become leaves that ask for gradients.
        mask: how the masks depend on them.
        lr: learning rate.
        optimizer: "SGD" or "Adam".

    Raises:
        RequestError: another optimizer, or no positive rate.
    """
    kinds = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
    if lr <= 0:
        raise RequestError(f"a learning rate of {lr} for a mask", expected="a positive number", do="leave lr out")
    made: torch.optim.Optimizer = kinds[one_of(optimizer, kinds, what="optimizer of a mask")](
        [s.requires_grad_(True) for s in masks.values()], lr=lr
    )

    def hold(*_: Any) -> None:
        for s in masks.values():
            mask.hold_(s)

    made.register_step_post_hook(hold)
    return made
