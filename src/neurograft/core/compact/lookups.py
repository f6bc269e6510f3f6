"""Embeddings and tables of positions with a live weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.core.compact.live import Live, check_epoch, handed
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
        check_epoch(ctx.live, ctx.epoch)
        (tokens,) = ctx.saved_tensors
        found = lookup_gradient(ctx.live, tokens, grads[0], ctx.skip, ctx.dtype)
        return grads[0], None, found.reshape(ctx.shape), None, None


def lookup_gradient(live: Live, tokens: Tensor, g: Tensor, skip: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a table's values from the gradient g [..., C] of the rows that tokens [...] looked up.

    `skip` is the padding token, which gives none, or -1.
    """
    # Thousands of tokens may share a row: in bfloat16 a sum of ones would stop at 256.
    tokens, g, region = tokens.reshape(-1), g.reshape(-1, g.shape[-1]).to(dtype), live.region
    if skip >= 0:
        g = g.masked_fill((tokens == skip)[:, None], 0.0)
    if region.layout == "cols":
        rows = region.matrix[1]
        return g.new_zeros(rows, len(region.ids)).index_add_(0, tokens, g.index_select(1, region.ids)).t()
    lookup = live.looked_up()
    if lookup.at is not None:
        return scattered_gradient(lookup.slots[tokens], g, lookup.at, lookup.count)
    return g.new_zeros(lookup.count + 1, g.shape[1]).index_add_(0, lookup.slots[tokens], g)[:-1]


class _LookupBeside(torch.autograd.Function):
    """The rows looked up as if the table held the values: what these differ from it is looked up and added."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: Tensor, theta: Tensor, base: Tensor, live: Live, skip: int) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.live, ctx.epoch, ctx.skip, ctx.shape, ctx.dtype = live, live.moment, skip, theta.shape, theta.dtype
        return y + _rows_of(live, tokens.reshape(-1), (theta - base).to(y.dtype)).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        check_epoch(ctx.live, ctx.epoch)
        found = None
        if ctx.needs_input_grad[2]:
            (tokens,) = ctx.saved_tensors
            found = lookup_gradient(ctx.live, tokens, grads[0], ctx.skip, ctx.dtype).reshape(ctx.shape)
        return grads[0], None, found, None, None, None


def _rows_of(live: Live, tokens: Tensor, values: Tensor) -> Tensor:
    """Return rows [N, C] of a table that holds `values` in the region and 0 elsewhere."""
    region, (_, rows, columns) = live.region, live.region.matrix
    if region.layout == "all":
        return values.view(rows, columns)[tokens]
    if region.layout == "cols":
        return values.new_zeros(len(tokens), columns).index_copy(1, region.ids, values[:, tokens].t())
    lookup = live.looked_up()
    slots = lookup.slots[tokens]
    if lookup.at is None:
        return torch.cat([values, values.new_zeros(1, columns)])[slots]
    return scattered_rows(slots, values.reshape(-1), lookup.at, lookup.count, columns)


@torch.library.custom_op("neurograft::scattered_rows", mutates_args=())
def scattered_rows(slots: Tensor, values: Tensor, at: Tensor, count: int, columns: int) -> Tensor:
    """Return rows of a table [count + 1, C] that holds values at some places; only those asked for are built.

    Args:
        slots: [N], the rows, `count` for one of zeros.
        values: [k]. at: [k], entry numbers in the table.
    """
    used, place, held, entries = _used(slots, at, count, columns)
    table = values.new_zeros(used * columns)
    table[entries] = values[held]
    return table.view(used, columns)[place]


@scattered_rows.register_fake
def _(slots: Tensor, values: Tensor, at: Tensor, count: int, columns: int) -> Tensor:
    return values.new_empty(slots.shape[0], columns)


@torch.library.custom_op("neurograft::scattered_gradient", mutates_args=())
def scattered_gradient(slots: Tensor, g: Tensor, at: Tensor, count: int) -> Tensor:
    """Return the gradient [k] of a table's scattered values from that of the rows looked up, g [N, C]."""
    columns = g.shape[1]
    used, place, held, entries = _used(slots, at, count, columns)
    rows, found = g.new_zeros(used, columns).index_add_(0, place, g), g.new_zeros(len(at))
    found[held] = rows.view(-1)[entries]
    return found


@scattered_gradient.register_fake
def _(slots: Tensor, g: Tensor, at: Tensor, count: int) -> Tensor:
    return g.new_empty(at.shape[0])


def _used(slots: Tensor, at: Tensor, count: int, columns: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return how many rows are looked up, which of these each lookup is, which values they hold, and where."""
    used, place = slots.unique(return_inverse=True)
    local = slots.new_full((count + 1,), -1)
    local[used] = torch.arange(len(used), device=slots.device)
    rows = local[at // columns]
    held = rows >= 0
    return len(used), place, held, rows[held] * columns + at[held] % columns


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
    if live.beside:
        beside: Tensor = _LookupBeside.apply(y, tokens, live.source(), live.original, live, skip)
        return beside
    if not live.theta.requires_grad:
        return y
    found: Tensor = _EmbeddingTap.apply(y, tokens, live.source(), live, skip)
    return found
