"""Meters: what a training step keeps in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Saved:
    """What autograd keeps for the backward pass.

    `bytes` counts every storage once, however many operations save it, and leaves out the model's own
    parameters and buffers, which exist anyway.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.held: list[Any] = []

    @property
    def bytes(self) -> int:
        """Bytes kept so far."""
        return sum(self.sizes.values())


@contextmanager
def saved(model: nn.Module) -> Iterator[Saved]:
    """Count the bytes that operations inside the block save for their backward pass.

    Args:
        model: whose parameters and buffers are not counted.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> with saved(net) as meter:
        ...     _ = net(torch.ones(4, 3))
        >>> meter.bytes  # the input, [4, 3] in float32
        48
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = Saved()

    def pack(x: Tensor) -> Tensor:
        for dense in (x._indices(), x._values()) if x.is_sparse else (x,):
            storage = dense.untyped_storage()
            if storage.data_ptr() not in own and storage.data_ptr() not in found.sizes:
                found.sizes[storage.data_ptr()] = storage.nbytes()
                found.held.append(storage)  # an address is not used twice while its storage is held
        return x.detach()  # an output kept by its own graph would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found
    found.held.clear()
