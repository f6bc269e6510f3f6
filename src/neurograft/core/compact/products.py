"""Matrix products with a live weight: `linear`, `addmm`, `matmul`, and the grouped product of expert banks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurograft.core.compact import additions
from neurograft.core.compact.banks import grouped_gradient
from neurograft.core.compact.deferred import pays
from neurograft.core.compact.gradients import Side
from neurograft.core.compact.live import Live, Tap, alias, check_epoch, handed
from neurograft.core.marks import Watched


def _place(weight: Any) -> tuple[Live, int, bool, tuple[int, int]] | None:
    """Say which matrix of the bank a 2-D weight shows, whether transposed, and which rows of it.

    Returns None if the view is not a whole matrix or a range of its rows.
    """
    live: Live = weight.neurograft
    banks, rows, columns = live.region.matrix
    if not hasattr(weight, "shift"):
        return (live, 0, False, (0, rows)) if banks == 1 else None
    start = 0
    if not torch.compiler.is_compiling():  # the weight itself may begin inside a storage that it shares
        start = weight.storage_offset() + weight.shift - live.weight.storage_offset()
    (high, wide), stride = weight.shape, weight.stride()
    flipped = stride == (1, columns) and not (stride == (columns, 1) and wide == columns)
    if flipped:
        high, wide = wide, high
    elif stride != (columns, 1):
        return None
    if wide != columns or start % columns or high > rows:
        return None
    bank, first = divmod(start // columns, rows)
    return (live, bank, flipped, (first, first + high)) if first + high <= rows else None


def _product(y: Tensor, x: Tensor, weight: Any, side: Side, *, inward: _Inward | None = None) -> Tensor | None:
    """Attach the gradient to y = x @ W.T (side "column") or y = x @ W (side "row"); None if it cannot."""
    place = _place(weight)
    if place is None:
        return None
    live, bank, flipped, (first, last) = place
    if last - first != live.region.matrix[1]:
        return None
    if flipped:
        side = "row" if side == "column" else "column"
    chosen, lo, hi = live.local(bank, side)
    if live.beside and hi > lo:
        return additions.product(y, x, live, chosen, (lo, hi))
    if hi == lo or not live.theta.requires_grad:  # no entries here, or they sleep
        return y
    theta = live.source()
    part = theta if hi - lo == theta.shape[0] else theta[lo:hi]
    return Tap.apply(y, x, part, chosen, live, *(inward or ()))


class _Inward(NamedTuple):
    """What a tap needs to yield the gradient of a product's input.

    Args:
        weight: [m, n], by which the gradient of the output is multiplied.
        bias: [m], or None.
        late: whether the gradient is put off.
    """

    weight: Tensor
    bias: Tensor | None
    late: bool


def _tapped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, at: int, side: Side) -> Any:
    """Run a matrix product, tap its weight (argument `at`), alias any other live argument (a bias)."""
    weight = args[at]
    rest = tuple(a if i == at else alias(a, func) for i, a in enumerate(args))
    extra = {k: alias(v, func) for k, v in kwargs.items()}
    if not isinstance(weight, Watched):
        return func(*rest, **extra)
    inward = None
    if not extra and x is rest[at - 1]:
        inward = _inward(x, weight, [a for i, a in enumerate(rest) if i not in (at - 1, at)], side)
    if inward is None:
        plain = func(*rest, **extra)
    else:
        with torch.no_grad():
            plain = func(*rest)
    tapped = _product(plain, x, weight, side, inward=inward)
    return NotImplemented if tapped is None else tapped


def _inward(x: Tensor, weight: Any, more: list[Any], side: Side) -> _Inward | None:
    """Say how the gradient of the product's input is found by the tap itself, or None to leave it to torch.

    Args:
        x: [..., n].
        weight: live, [m, n] on side "column".
        more: the product's other arguments: a bias, None or nothing.
        side: where x stands.
    """
    live: Live = weight.neurograft
    bias = more[0] if more else None
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.requires_grad or not torch.is_grad_enabled():
        return None
    if weight is not live.weight or _dims(weight) != 2 or live.beside or not live.theta.requires_grad:
        return None
    if torch.is_autocast_enabled(x.device.type) or x.dim() < 2:
        return None
    found = live.weight.detach()  # the same numbers, to which nothing happens when they are read
    found = found if side == "column" else found.t()
    if len(more) > 1 or (bias is not None and bias.shape != found.shape[:1]):
        return None
    return _Inward(found, bias, pays(x, Tap))


def linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = args + tuple(kwargs[n] for n in ("input", "weight", "bias")[len(args) :] if n in kwargs)
    return _tapped(func, given, {}, given[0], 1, "column")


def addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) < 3 or isinstance(args[1], Watched) or kwargs:
        return NotImplemented
    return _tapped(func, args, kwargs, args[1], 2, "row")


def _dims(weight: Any) -> int:
    found: int = weight.dim()
    return found


def matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and isinstance(args[1], Watched) and _dims(args[1]) == 2:
        return _tapped(func, args, kwargs, args[0], 1, "row")
    if len(args) == 2 and isinstance(args[0], Watched) and _dims(args[0]) == 2 and args[1].dim() >= 2:
        # y = W @ x is y.T = x.T @ W.T
        y = func(*args)
        tapped = _product(y.transpose(-1, -2), args[1].transpose(-1, -2), args[0], "column")
        if tapped is not None:
            return tapped.transpose(-1, -2)
    return NotImplemented


def rmatmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return matmul(torch.matmul, (args[1], args[0]), kwargs)


class _GroupedTap(torch.autograd.Function):
    """`Tap` for a bank: the rows of x and y belong to experts in order, `ends` says where each stops."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, theta: Tensor, live: Live, side: Side, ends: list[int]) -> Tensor:
        kept, ctx.pieces = [], []
        for bank, (lo, hi) in enumerate(zip([0, *ends], ends)):
            chosen, first, last = live.local(bank, side)
            if hi > lo and last > first:
                piece = x[lo:hi]
                kept.append(piece if chosen.keep is None else piece.index_select(-1, chosen.keep))
                ctx.pieces.append((chosen, first, last, lo, hi))
        ctx.save_for_backward(*kept)
        ctx.live, ctx.epoch, ctx.like = live, live.moment, theta
        return handed(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        check_epoch(ctx.live, ctx.epoch)
        out = torch.zeros_like(ctx.like)
        for kept, (chosen, first, last, lo, hi) in zip(ctx.saved_tensors, ctx.pieces):
            found = chosen.gradient(kept, g[lo:hi])
            out[first:last] = found.view(out[first:last].shape).to(out.dtype)
        return g, None, out, None, None, None


class _GroupedWhole(torch.autograd.Function):
    """`_GroupedTap` for compilers, to which the places where experts stop are not known: the whole input is kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, theta: Tensor, live: Live, side: Side, offs: Tensor) -> Tensor:
        ctx.save_for_backward(x, offs)
        ctx.live, ctx.side, ctx.like = live, side, theta
        return handed(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (x, offs), region = grads, ctx.saved_tensors, ctx.live.region
        found = grouped_gradient(x, g, offs, region.ids, region.layout, ctx.side, list(region.matrix))
        return g, None, found.to(ctx.like.dtype), None, None, None


def grouped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`_grouped_mm(x, W, offs=)`: y rows of expert e = x rows of e @ W[e]."""
    x, weight, offs = args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None)
    live: Live | None = getattr(weight, "neurograft", None)
    if live is None or offs is None or weight.dim() != 3:
        return NotImplemented
    banks, _, columns = live.region.matrix
    if weight.shape[0] != banks or weight.numel() != live.weight.numel():
        return NotImplemented  # some of the experts, or half of the rows of each
    if weight.stride()[1:] == (1, columns):
        side: Side = "column"  # the weight arrives transposed: y = x @ W.T
    elif weight.stride()[1:] == (columns, 1):
        side = "row"
    else:
        return NotImplemented
    y = func(*args, **kwargs)
    if live.beside:
        return additions.grouped(y, x, live, side, offs)
    if not live.theta.requires_grad:
        return y
    if torch.compiler.is_compiling():
        return _GroupedWhole.apply(y, x, live.source(), live, side, offs)
    return _GroupedTap.apply(y, x, live.source(), live, side, offs.tolist())
