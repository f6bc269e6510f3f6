"""Products of float32 matrices on a CPU, by the faster of the two libraries that torch brings along."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WORTH = 1 << 22  # multiplications from which on the choice pays for itself (measured by `benchmarks/kernels.py`)
FEW = 2  # rows below which torch's own matrix-vector product is as fast


@cache
def _wide() -> bool:
    """Say whether this machine has 512-bit vectors, and this torch a product of oneDNN's that is called as here."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    with torch.no_grad():
        ones = torch.ones(2, 2, device="cpu")
        try:
            return torch.equal(_product(ones, ones), ones + ones)
        except (AttributeError, RuntimeError, TypeError):  # no public operation: another torch may have another
            return False


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of two matrices; where a gradient passes through, torch's own.

    `torch.mm` asks MKL for float32, which on processors of other makers keeps to 256-bit vectors; oneDNN uses all
    512 and takes half the time. Sums are taken in another order, so the last bits differ from those of `torch.mm`.
    `torch.backends.mkldnn.flags(enabled=False)` turns it off.

    Args:
        a: [N, K]. b: [K, M].

    Returns:
        [N, M]; not always contiguous.

    Example:
        >>> matmul(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])).tolist()
        [[11.0]]
    """
    if not _other(a, b):
        return a @ b
    if a.stride(0) == 1 and b.shape[1] < a.shape[0]:  # a wide left operand that lies transposed is oneDNN's slow case
        return _product(b.t(), a.t()).t()
    return _product(a, b)


def _other(a: Tensor, b: Tensor) -> bool:
    """Say whether oneDNN computes a @ b, and faster."""
    if type(a) is not Tensor or type(b) is not Tensor or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    (rows, inner), columns = a.shape, b.shape[1]
    if min(rows, columns) < FEW or rows * inner * columns < WORTH or a.device.type != "cpu" or b.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return False
    if not (_plain(a) and _plain(b)):
        return False
    return torch._C._get_mkldnn_enabled() and _wide()


def _plain(t: Tensor) -> bool:
    """Say whether t or its transpose lies row by row, perhaps as some columns of a wider matrix."""
    (high, wide), (down, across) = t.shape, t.stride()
    return (across == 1 and down >= wide) or (down == 1 and across >= high)


def _product(a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return found
