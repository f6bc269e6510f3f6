"""attach: make part of a model trainable, for any loop and any Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from neurograft.core.choose import choose
from neurograft.core.compact.mount import Mount
from neurograft.core.errors import RequestError
from neurograft.core.selection import Selection

Where = Selection | str | Path | None
SLICE = "neurograft.adapters.slice"


def attach(
    model: nn.Module,
    where: Where = None,
    *,
    adapter: Any = "slice",
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Where = None,
    **options: Any,
) -> Mount:
    """Make the selected units trainable and freeze the rest; leaving the block puts the model back bit for bit.

    Args:
        model: the model.
        where: a selection, or the path of a saved one; None trains everything (adapter="dense").
        adapter: in what shape: a choice of `adapters`.
        new: parameters the base's checkpoint lacks (patterns), trained whole; or name -> rows the base has.
        protect: units whose numbers must not move.
        **options: the adapter's.

    Returns:
        A `Mount`: `.parameters()` for an optimizer, `.graft()` for the change so far, usable in a `with` block.

    Raises:
        RequestError: an unknown adapter or option, or a selection that touches nothing.

    Example:
        >>> import torch
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> net = pico("llama")
        >>> with attach(net) as live:
        ...     loss = net(**pico_batch(net)).loss
        ...     loss.backward()
        ...     torch.optim.SGD(live.parameters(), lr=0.1).step()
        >>> live.graft().empty
        False
    """
    if not isinstance(model, nn.Module):
        raise RequestError(f"a model of type {type(model).__name__}", expected="a live model", do="load it first")
    where, protect = selection_of(where), selection_of(protect)
    if where is None and adapter == "slice":
        adapter = "dense"
    made = choose("adapters", adapter, **options)
    if where is None and made.name == SLICE:
        raise RequestError(
            "adapter='slice' with options and no selection",
            expected="the units to train",
            do="pass a selection, or leave adapter out to train everything",
        )
    mount: Mount = made(model, where, new=new, protect=protect)
    return mount


def selection_of(where: Where) -> Selection | None:
    """Return a selection given as itself, by path, or not at all.

    Raises:
        RequestError: something else.
    """
    if where is None or isinstance(where, Selection):
        return where
    if isinstance(where, (str, Path)):
        return Selection.load(where)
    raise RequestError(
        f"a selection of type {type(where).__name__}",
        expected="a Selection or the path of a saved one",
        do="scores.top(fraction=0.01), or ng.select(scores, ...)",
    )


def takes(adapter: Any, option: str) -> bool:
    """Say whether an adapter has an option."""
    return option in inspect.signature(choose("adapters", adapter).function).parameters
