"""Matrix products with a live weight that is never written: y + x @ D.T, D the difference of its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.core.compact.banks import grouped_gradient, grouped_through
from neurograft.core.compact.gradients import Route, Side
from neurograft.core.compact.live import Live, check_epoch, handed
from neurograft.core.compact.through import other, through


class _Product(torch.autograd.Function):
    """y + x @ D.T or y + x @ D; only what the gradient needs of x is kept, and D is made anew from the values."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, theta: Tensor, base: Tensor, chosen: Route, live: Live) -> Tensor:
        ctx.kept = theta.requires_grad
        kept = x if chosen.keep is None else x.index_select(-1, chosen.keep)
        ctx.save_for_backward(kept if ctx.kept else None, theta, base)
        ctx.chosen, ctx.live, ctx.shape, ctx.like = chosen, live, x.shape, x.dtype
        ctx.epoch = live.moment
        v, onto = x.reshape(-1, x.shape[-1]).to(y.dtype), y.reshape(-1, y.shape[-1])
        found = through(v, (theta - base).to(y.dtype), chosen.region, chosen.side, onto)
        return handed(found.view(y.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        check_epoch(ctx.live, ctx.epoch)
        kept, theta, base = ctx.saved_tensors
        g, chosen, back, found = grads[0].reshape(-1, grads[0].shape[-1]), ctx.chosen, None, None
        if ctx.needs_input_grad[1]:
            delta = (theta - base).to(g.dtype)
            back = through(g, delta, chosen.region, other(chosen.side)).view(ctx.shape).to(ctx.like)
        if ctx.kept:
            found = chosen.gradient(kept.reshape(-1, kept.shape[-1]), g).reshape(theta.shape).to(theta.dtype)
        return grads[0], back, found, None, None, None


def product(y: Tensor, x: Tensor, live: Live, chosen: Route, part: tuple[int, int]) -> Tensor:
    """Return the product y of x and the weight as if the weight held the values.

    Args:
        y: [..., m], the product with the weight as it is.
        x: [..., f].
        live: the weight's trainable side.
        chosen: its entries in this matrix, and where x stands.
        part: the range of the values' first axis that belongs to this matrix.
    """
    theta, base = live.source(), live.original
    if part != (0, theta.shape[0]):
        theta, base = theta[part[0] : part[1]], base[part[0] : part[1]]
    found: Tensor = _Product.apply(y, x, theta, base, chosen, live)
    return found


class _Grouped(torch.autograd.Function):
    """`_Product` for a bank whose experts own consecutive rows of x, as `offs` says."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, theta: Tensor, base: Tensor, live: Live, side: Side, offs: Tensor
    ) -> Tensor:
        ctx.kept = theta.requires_grad
        ctx.save_for_backward(x if ctx.kept else None, theta, base, offs)
        ctx.live, ctx.side, ctx.like, ctx.epoch = live, side, x.dtype, live.moment
        return y + _of_bank(x.to(y.dtype), theta, base, offs, live, side)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        check_epoch(ctx.live, ctx.epoch)
        x, theta, base, offs = ctx.saved_tensors
        (g,), region, back, found = grads, ctx.live.region, None, None
        if ctx.needs_input_grad[1]:
            back = _of_bank(g, theta, base, offs, ctx.live, other(ctx.side)).to(ctx.like)
        if ctx.kept:
            found = grouped_gradient(x, g, offs, region.ids, region.layout, ctx.side, list(region.matrix))
            found = found.to(theta.dtype)
        return g, back, found, None, None, None, None


def _of_bank(v: Tensor, theta: Tensor, base: Tensor, offs: Tensor, live: Live, side: Side) -> Tensor:
    region, delta = live.region, (theta - base).to(v.dtype)
    return grouped_through(v, delta, offs, region.ids, region.layout, side, list(region.matrix))


def grouped(y: Tensor, x: Tensor, live: Live, side: Side, offs: Tensor) -> Tensor:
    """Return a grouped product as if the bank held the values; y, x: [N, ...], offs: [E], where experts stop."""
    found: Tensor = _Grouped.apply(y, x, live.source(), live.original, live, side, offs)
    return found
