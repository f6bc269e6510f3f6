"""Salient channels: how strong each channel of the residual stream is, class by class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.anatomy.entering import entering, stream_of
from neurograft.core.card import method
from neurograft.core.context import Batch, Context
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores
from neurograft.core.taps.behind import Behind
from neurograft.core.taps.look import look
from neurograft.locators._common import need_batches, scored

Sums = dict[int, Tensor]


@method(
    paper="sct",
    kinds={"channel"},
    needs={"batches", "taps"},
    takes={"positions"},
    claims={"finite", "length"},
    departs="Without a class for each example (language models, unlabelled data) all examples are one class.",
)
def salient(context: Context, *, skip: int = 0) -> Scores:
    """Score each channel by the mean over classes of ||x[..., channel]||_2 over all tokens of a class's examples.

    x is the residual stream behind a block's first sub-layer (attention); for other sites, what their tap carries.

    Args:
        context: model, channels, batches; classes are `labels` [B].
        skip: tokens left out at the front of each example: 1 for a class token.

    Raises:
        RequestError: no data, or no token left.
    """
    need_batches(context)
    if skip < 0:
        raise RequestError(f"skip={skip}", expected="0 or more tokens", do="1 where a class token stands in front")
    known, sums, now = entering(context.model), {n: Sums() for n in context.sites}, list[Batch]()
    seats = []
    try:
        for name, site in context.sites.items():
            assert site.tap is not None

            def read(stream: Tensor, mine: Sums = sums[name]) -> None:
                _add(mine, stream.detach(), context, now[0], skip)

            block = stream_of(known, site)
            seats.append(Behind(context.model, site.tap.module, block, read, dim=site.tap.dim))
        hooked = [site.tap.module for site in context.sites.values() if site.tap is not None]
        for batch in context.batches:
            now[:] = [batch]
            with torch.no_grad():
                look(context.model, batch, hooked=hooked)
    finally:
        for seat in seats:
            seat.remove()
    silent = next((n for n, found in sums.items() if not found), None)
    if silent is not None:
        raise RequestError(
            f"no token at {silent!r} behind the first {skip}", expected="tokens to read", do="lower skip, or give data"
        )
    values = {n: torch.stack([s.sqrt() for s in found.values()]).mean(0) for n, found in sums.items()}
    return scored(context, values, {"skip": skip, "classes": len(next(iter(sums.values())))})


def _add(sums: Sums, stream: Tensor, context: Context, batch: Batch, skip: int) -> None:
    """Add the squares of [B, ..., n] to the sums of each example's class."""
    x = stream.double().reshape(len(stream), -1, stream.shape[-1])
    mask = context.mask(batch)
    if mask is not None and mask.shape == x.shape[:2]:
        x = x * mask[..., None]
    squares = x[:, skip:].square().sum(1).cpu()
    if x.shape[1] <= skip:
        return
    for row, kind in zip(squares, _classes(batch.get("labels"), len(x))):
        sums[kind] = sums[kind] + row if kind in sums else row


def _classes(labels: Any, count: int) -> list[int]:
    """Return the class of each of `count` examples; one for all where they have none."""
    if isinstance(labels, Tensor) and labels.shape == (count,) and not labels.is_floating_point():
        return [int(kind) for kind in labels]
    return [0] * count
