"""Embeddings and convolutions with a live weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurograft.core.compact.live import Live, alias, check_epoch, handed
from neurograft.core.marks import Watched


class _EmbeddingTap(torch.autograd.Function):
    """`Tap` for a lookup: nothing but the token numbers is kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: Tensor, theta: Tensor, live: Live, skip: int) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.live, ctx.epoch, ctx.skip = live, live.moment, skip
        ctx.shape, ctx.dtype = theta.shape, theta.dtype
        return handed(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        check_epoch(ctx.live, ctx.epoch)
        (tokens,), region = ctx.saved_tensors, ctx.live.region
        # Thousands of tokens may share a row: in bfloat16 a sum of ones would stop at 256.
        tokens, g = tokens.reshape(-1), g.reshape(-1, g.shape[-1]).to(ctx.dtype)
        if ctx.skip >= 0:
            g = g.masked_fill((tokens == ctx.skip)[:, None], 0.0)
        if region.layout == "cols":
            rows = region.matrix[1]
            out = g.new_zeros(rows, len(region.ids)).index_add_(0, tokens, g.index_select(1, region.ids)).t()
            return grads[0], None, out, None, None
        lookup = ctx.live.looked_up()
        out = g.new_zeros(lookup.count + 1, g.shape[1]).index_add_(0, lookup.slots[tokens], g)[:-1]
        if lookup.at is not None:
            out = out.reshape(-1).index_select(0, lookup.at)
        return grads[0], None, out.reshape(ctx.shape), None, None


def embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args)) | kwargs
    weight: Any = given["weight"]
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
        return NotImplemented
    if not isinstance(weight, Watched) or hasattr(weight, "shift"):
        return NotImplemented
    live: Live = weight.neurograft
    skip = given.get("padding_idx")
    skip = -1 if skip is None else int(skip) % live.region.shape[0]
    return _looked_up(func(*args, **kwargs), given["input"], live, skip)


def gathered(y: Tensor, weight: Any, index: Any) -> Any:
    """`weight[index]` with a tensor of row numbers: a lookup (tables of positions); not of whole experts."""
    rows = isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool
    if not rows or hasattr(weight, "shift") or weight.neurograft.region.matrix[0] != 1 or y.dim() != index.dim() + 1:
        return NotImplemented
    live: Live = weight.neurograft
    return _looked_up(y, index.remainder(live.region.matrix[1]), live, -1)


def _looked_up(y: Tensor, tokens: Tensor, live: Live, skip: int) -> Tensor:
    if not live.theta.requires_grad:
        return y
    found: Tensor = _EmbeddingTap.apply(y, tokens, live.source(), live, skip)
    return found


class _ConvTap(torch.autograd.Function):
    """`Tap` for a convolution: filters and input channels by index, anything else by bounded chunks of filters."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, theta: Tensor, live: Live, options: tuple[Any, ...]) -> Tensor:
        region, (*_, groups) = live.region, options
        ctx.channels = None
        if region.layout == "cols" and groups == 1:
            window = region.matrix[2] // region.shape[1]
            ctx.channels = (region.ids // window).unique()
            x = x.index_select(1, ctx.channels)
        ctx.save_for_backward(x)
        ctx.live, ctx.epoch, ctx.options = live, live.moment, options
        ctx.shape, ctx.dtype = theta.shape, theta.dtype
        return handed(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        check_epoch(ctx.live, ctx.epoch)
        (x,) = ctx.saved_tensors
        found = _conv_gradient(x.to(g.dtype), g, ctx.live.region, ctx.channels, ctx.options)  # autocast casts x
        return g, None, found.reshape(ctx.shape).to(ctx.dtype), None, None


def _conv_gradient(x: Tensor, g: Tensor, region: Any, channels: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    stride, padding, dilation, groups = options
    filters, wide, *window = region.shape

    def of_filters(ids: Tensor) -> Tensor:
        picked, gradient, n = x, g.index_select(1, ids), 1
        inner = x.shape[1]
        if groups > 1:
            owner = ids // (filters // groups)
            picked = x.index_select(1, (owner[:, None] * wide + torch.arange(wide, device=ids.device)).reshape(-1))
            n, inner = len(ids), wide
        weight = torch.empty(len(ids), inner, *window, dtype=x.dtype, device=x.device)
        found = torch.ops.aten.convolution_backward(
            gradient, picked, weight, None, stride, padding, dilation, False, [0] * len(stride), n, [False, True, False]
        )
        return found[1]

    everything = torch.arange(filters, device=g.device)
    if region.layout == "rows":
        return of_filters(region.ids)
    if channels is not None:
        size = region.matrix[2] // wide
        local = torch.searchsorted(channels, region.ids // size) * size + region.ids % size
        return of_filters(everything).reshape(filters, -1).index_select(1, local).t()
    flat, columns, out = region.flat(), region.matrix[2], []
    order = flat.argsort() if region.layout in ("cols", "block") else None
    entries = flat if order is None else flat[order]
    for ids in everything.split(64):
        lo, hi = torch.searchsorted(entries, torch.stack([ids[0] * columns, (ids[-1] + 1) * columns])).tolist()
        if hi > lo:
            out.append(of_filters(ids).reshape(-1).index_select(0, entries[lo:hi] - ids[0] * columns))
    found = torch.cat(out)
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


def conv(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args)) | kwargs
    weight, dims = given["weight"], given["weight"].dim() - 2
    given["bias"] = alias(given.get("bias"), func)
    whole = isinstance(weight, Watched) and not hasattr(weight, "shift")
    if not isinstance(weight, Watched):
        return func(**given)
    if not whole or given["input"].dim() != dims + 2:
        return NotImplemented
    if given.get("padding") == "valid":
        given["padding"] = 0
    if isinstance(given.get("padding"), str):
        return NotImplemented
    options = tuple(_spread(given.get(n, d), dims) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    y = func(**given)
    live: Live = weight.neurograft
    if not live.theta.requires_grad:
        return y
    return _ConvTap.apply(y, given["input"], live.source(), live, (*options, given.get("groups", 1)))


def _spread(value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)
