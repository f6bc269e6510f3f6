"""By how much, or to what, an intervention changes activations: the values each kind takes, and what it makes of them.

Shape letters: k chosen units, w features of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.errors import RequestError


def checked(kind: str, value: Tensor | None, k: int, w: int) -> Tensor | None:
    """Return a value as the interventions keep it, float32 on the CPU; see `Intervention` for the shapes.

    Raises:
        RequestError: another shape, numbers that are not finite, or a matrix that is not orthogonal where one must be.

    Example:
        >>> checked("scale", torch.tensor(0.5), 3, 1), checked("zero", None, 3, 1)
        (tensor(0.5000), None)
    """
    known = _shapes(kind, value, k, w)
    if value is None and not known:
        return None
    shape = None if value is None else tuple(value.shape)
    unit = (k,) if w == 1 else (k, w)
    aligned = kind == "replace" and shape is not None and len(shape) == 2 + len(unit) and shape[2:] == unit
    if shape is None or (shape not in known and not aligned):
        raise RequestError(
            f"{kind} with a value of shape {shape} for {k} units of {w} features",
            expected=" or ".join(map(str, known)) or "no value",
            do="give one value for all units, or one for each",
        )
    assert value is not None
    if not bool(torch.isfinite(value).all()):
        raise RequestError(f"{kind} with values that are not finite", expected="numbers", do="check the value")
    value = value.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    if kind in ("rotate", "remove"):
        _check_orthogonal(kind, value)
    return value


def applied(kind: str, value: Tensor | None, old: Tensor, w: int, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return what activations become.

    Args:
        kind: of the intervention.
        value: as `checked` returned it.
        old: the chosen units' activations, [..., k], or [..., k, w] of wider ones.
        w: features of a unit.
        at: batch rows and positions of the activations, for a value that stands at these.

    Returns:
        Shaped like `old`; float32, or float64 where `old` is, but for zeros.

    Example:
        >>> applied("scale", torch.tensor([2.0, 0.5]), torch.tensor([[1.0, 4.0]]), 1)
        tensor([[2., 2.]])
    """
    if kind == "zero":
        return torch.zeros_like(old)
    assert value is not None
    value = value.to(old.device, old.dtype if old.dtype == torch.float64 else torch.float32)
    if kind == "rotate":
        turned = old.to(value.dtype)[..., None, :] @ value if value.dim() == 3 else old.to(value.dtype) @ value
        return turned.squeeze(-2) if value.dim() == 3 else turned
    if kind == "remove":
        wide = old.to(value.dtype)
        return wide - (wide @ value.mT) @ value
    if at is not None:
        rows, places = at
        return value[rows % value.shape[0], places.clamp(max=value.shape[1] - 1)]
    if w > 1 and value.dim() == 1:
        value = value[:, None]
    if kind == "scale":
        return old * value
    return old + value if kind == "add" else value.expand_as(old)


def _shapes(kind: str, value: Tensor | None, k: int, w: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that a kind takes, but for values that stand at rows and positions."""
    if kind == "zero":
        return ()
    if kind == "rotate":
        return ((k, k),) if w == 1 else ((w, w), (k, w, w))
    if kind == "remove":
        return ((len(value) if value is not None and value.dim() == 2 else 1, w),)
    return ((), (k,)) if w == 1 else ((), (k,), (k, w))


def _check_orthogonal(kind: str, value: Tensor) -> None:
    off = (value @ value.mT - torch.eye(value.shape[-2])).abs().max()
    if off > 1e-4:
        raise RequestError(
            f"a matrix that is no rotation (off by {float(off):.2g})"
            if kind == "rotate"
            else f"directions to remove that are not orthonormal (off by {float(off):.2g})",
            expected="R @ R.T = 1",
            do="make it orthogonal, e.g. torch.linalg.qr(R).Q",
        )
