"""Muon with the orthogonalisation in float32, for machines that have no fast bfloat16 product."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon:
    """Momentum whose update is orthogonalised, for matrices [R, C]; as `torch.optim.Muon(weight_decay=0)`.

    torch's class works in bfloat16, ten times slower than float32 on a processor without such units.

    Args:
        matrices: the parameters.
        momentum: of the running mean, Nesterov's way.
    """

    def __init__(self, matrices: Iterable[Tensor], *, momentum: float = 0.95) -> None:
        self.matrices = list(matrices)
        self.momentum = momentum
        self.running = [torch.zeros_like(m) for m in self.matrices]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every matrix by `lr * sqrt(max(1, R / C))` along its orthogonalised gradient."""
        for matrix, mean in zip(self.matrices, self.running):
            assert matrix.grad is not None
            mean.lerp_(matrix.grad, 1 - self.momentum)
            update = orthogonal(matrix.grad.lerp(mean, self.momentum))
            matrix.sub_(update, alpha=lr * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)
            matrix.grad = None


def orthogonal(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """Return nearly U V^T of a matrix's singular value decomposition, by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.t()
