"""Numerics that several rooms share: how alike two sets of representations are, and their main directions."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear centred kernel alignment of [m, d] and [m, e]; 1 for equal inputs, exactly.

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), columns centred; by Gram matrices where there are fewer rows than
    features. Rotations and one common scale do not change it.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
        >>> linear_cka(x, x), round(linear_cka(x, 3 * x.flip(1)), 6)
        (1.0, 1.0)
    """
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
    if len(x) <= x.shape[1]:
        k, m = x @ x.t(), y @ y.t()
        cross, own, other = (float((a * b).sum()) for a, b in ((k, m), (k, k), (m, m)))
    else:
        cross, own, other = (float((a.t() @ b).square().sum()) for a, b in ((x, y), (x, x), (y, y)))
    return 1.0 if own == other == 0 else cross / max(own * other, 1e-300) ** 0.5


def principal(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first principal directions of the rows of [m, d], the strongest first.

    Returns:
        directions float64 [count, d], orthonormal (fewer if the centred rows have a lower rank), and the singular
        values [min(m, d)].

    Example:
        >>> directions, sizes = principal(torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 3.0]]), 2)
        >>> directions.abs().tolist(), len(sizes)
        ([[0.0, 1.0]], 2)
    """
    x = x.double() - x.double().mean(0)
    _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
    rank = int((sizes > sizes[0] * max(x.shape) * torch.finfo(torch.float64).eps).sum()) if len(sizes) else 0
    return directions[: min(count, rank)], sizes


def mean_cca(x: Tensor, y: Tensor) -> float:
    """Return the mean canonical correlation of two sets of features over the same rows, [m, k] and [m, l].

    The singular values of Qx^T Qy, Q the orthonormal bases of the centred columns, averaged over min(k, l).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 5.0]])
        >>> round(mean_cca(x, x @ torch.tensor([[2.0, 1.0], [0.0, 3.0]])), 6)
        1.0
    """
    bases = [torch.linalg.qr(v.double() - v.double().mean(0)).Q for v in (x, y)]
    return float(torch.linalg.svdvals(bases[0].t() @ bases[1]).clamp(max=1).mean())
