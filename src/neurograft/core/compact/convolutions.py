"""Convolutions with a live weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from neurograft.core.compact.live import Live, alias, check_epoch, handed
from neurograft.core.marks import Watched
from neurograft.core.region import Region

CHUNK = 64  # filters whose dense gradient is held at a time


@dataclass(frozen=True)
class Filters:
    """Where the chosen entries of a convolution's weight lie, looked up once: a compiler meets no search for it.

    Args:
        channels: the input channels that chosen columns belong to; None for other layouts.
        bounds: of the chosen entries in ascending order, how many lie before each `CHUNK` filters, and of all.
    """

    channels: Tensor | None
    bounds: tuple[int, ...]


def filters(live: Live) -> Filters:
    """Return where the chosen entries of a convolution's weight lie, prepared once."""
    if live.filters is None:
        region = live.region
        count, wide, columns = region.shape[0], region.shape[1], region.matrix[2]
        if region.layout in ("rows", "all"):
            live.filters = Filters(None, ())
        else:
            channels = (region.ids // (columns // wide)).unique() if region.layout == "cols" else None
            firsts = torch.tensor([*range(0, count, CHUNK), count], device=region.ids.device) * columns
            live.filters = Filters(channels, tuple(torch.searchsorted(region.flat().sort().values, firsts).tolist()))
    found: Filters = live.filters
    return found


class _ConvTap(torch.autograd.Function):
    """`Tap` for a convolution: filters and input channels by index, anything else by bounded chunks of filters."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, theta: Tensor, live: Live, options: tuple[Any, ...]) -> Tensor:
        ctx.channels = _channels(live, options)
        x = x if ctx.channels is None else x.index_select(1, ctx.channels)
        ctx.save_for_backward(x)
        ctx.live, ctx.epoch, ctx.options = live, live.moment, options
        ctx.shape, ctx.dtype = theta.shape, theta.dtype
        return handed(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        check_epoch(ctx.live, ctx.epoch)
        (x,) = ctx.saved_tensors
        found = _conv_gradient(x.to(g.dtype), g, ctx.live, ctx.channels, ctx.options)  # autocast casts x
        return g, None, found.reshape(ctx.shape).to(ctx.dtype), None, None


class _ConvBeside(torch.autograd.Function):
    """A convolution as if its weight held the values: the chosen filters or channels convolved with the difference."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, theta: Tensor, base: Tensor, live: Live, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.channels, ctx.kept = _channels(live, options), theta.requires_grad
        kept = x if ctx.channels is None else x.index_select(1, ctx.channels)
        ctx.save_for_backward(kept if ctx.kept else None, theta, base)
        ctx.live, ctx.epoch, ctx.options, ctx.like = live, live.moment, options, x[:0]
        ctx.size = x.shape
        (*spread, groups), x, found = options, x.to(y.dtype), y.clone()  # in y's memory format, as the next kernel's
        for ids, part, picked, n in _pieces(live, (theta - base).to(y.dtype), ctx.channels, groups):
            given = x if picked is None else x.index_select(1, picked)
            found.index_add_(1, ids, _convolved(given, part, spread, n))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        check_epoch(ctx.live, ctx.epoch)
        (g,), (kept, theta, base), back, found = grads, ctx.saved_tensors, None, None
        *spread, groups = ctx.options
        if ctx.needs_input_grad[1]:
            back = g.new_zeros(ctx.size)
            for ids, part, picked, n in _pieces(ctx.live, (theta - base).to(g.dtype), ctx.channels, groups):
                wide = ctx.size[1] if picked is None else len(picked)
                like = g.new_empty(()).expand(ctx.size[0], wide, *ctx.size[2:])
                mine = _conv_back(g.index_select(1, ids), like, part, spread, n, (True, False))[0]
                back = back + mine if picked is None else back.index_add(1, picked, mine)
            back = back.to(ctx.like.dtype)
        if ctx.kept:
            found = _conv_gradient(kept.to(g.dtype), g, ctx.live, ctx.channels, ctx.options)
            found = found.reshape(theta.shape).to(theta.dtype)
        return g, back, found, None, None, None


def _convolved(x: Tensor, weight: Tensor, spread: Sequence[Any], groups: int) -> Tensor:
    stride, padding, dilation = spread
    found: Tensor = torch.ops.aten.convolution(
        x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
    )
    return found


def _conv_back(
    g: Tensor, x: Tensor, weight: Tensor, spread: Sequence[Any], groups: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a convolution's input and weight, as far as they are wanted."""
    stride, padding, dilation = spread
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [*wanted, False]
    )
    return found[:2]


def _channels(live: Live, options: tuple[Any, ...]) -> Tensor | None:
    """Return the input channels that the chosen entries read, if those are whole channels of the one group."""
    return filters(live).channels if options[-1] == 1 else None


Piece = tuple[Tensor, Tensor, Tensor | None, int]


def _pieces(live: Live, values: Tensor, channels: Tensor | None, groups: int) -> Iterator[Piece]:
    """Yield a difference as (filters, their weight, the channels that they read, groups), in bounded pieces."""
    region = live.region
    count, wide, *window = region.shape
    columns, everything = region.matrix[2], torch.arange(count, device=values.device)
    if region.layout == "all":
        yield everything, values.view(region.shape), None, groups
    elif region.layout == "rows":
        yield (region.ids, values.view(-1, wide, *window), *_read_by(region, region.ids, groups))
    elif channels is not None:
        size = columns // wide
        local = torch.searchsorted(channels, region.ids // size) * size + region.ids % size
        part = values.new_zeros(count, len(channels) * size).index_copy(1, local, values.t())
        yield everything, part.view(count, -1, *window), channels, 1
    else:
        flat, order = region.flat().sort()
        for ids, (lo, hi) in _chunks(live, everything):
            if hi > lo:
                part = values.new_zeros(len(ids) * columns)
                part = part.index_copy(0, flat[lo:hi] - ids[0] * columns, values.reshape(-1)[order[lo:hi]])
                yield (ids, part.view(-1, wide, *window), *_read_by(region, ids, groups))


def _chunks(live: Live, everything: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Yield a few filters at a time, and which of the sorted entries lie in them."""
    bounds = filters(live).bounds
    return zip(everything.split(CHUNK), pairwise(bounds), strict=True)


def _read_by(region: Region, ids: Tensor, groups: int) -> tuple[Tensor | None, int]:
    """Return the channels that filters read, filter by filter, and in how many groups; None for all in one."""
    if groups == 1:
        return None, 1
    wide = region.shape[1]
    owner = ids // (region.shape[0] // groups)
    return (owner[:, None] * wide + torch.arange(wide, device=ids.device)).reshape(-1), len(ids)


def _conv_gradient(x: Tensor, g: Tensor, live: Live, channels: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    (*spread, groups), region = options, live.region
    count, wide, *window = region.shape

    def of_filters(ids: Tensor) -> Tensor:
        picked, n = _read_by(region, ids, groups)
        given = x if picked is None else x.index_select(1, picked)
        inner = wide if groups > 1 else x.shape[1]
        like = torch.empty(len(ids), inner, *window, dtype=x.dtype, device=x.device)
        return _conv_back(g.index_select(1, ids), given, like, spread, n, (False, True))[1]

    everything = torch.arange(count, device=g.device)
    if region.layout == "rows":
        return of_filters(region.ids)
    if channels is not None:
        size = region.matrix[2] // wide
        local = torch.searchsorted(channels, region.ids // size) * size + region.ids % size
        return of_filters(everything).reshape(count, -1).index_select(1, local).t()
    if region.layout == "all":
        return torch.cat([of_filters(ids).reshape(-1) for ids in everything.split(CHUNK)])
    flat, columns, out = region.flat(), region.matrix[2], []
    order = flat.argsort() if region.layout in ("cols", "block") else None
    entries = flat if order is None else flat[order]
    for ids, (lo, hi) in _chunks(live, everything):
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
    every = (*options, given.get("groups", 1))
    if live.beside:
        return _ConvBeside.apply(y, given["input"], live.source(), live.original, live, every)
    if not live.theta.requires_grad:
        return y
    return _ConvTap.apply(y, given["input"], live.source(), live, every)


def _spread(value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)
