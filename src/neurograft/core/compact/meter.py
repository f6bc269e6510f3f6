"""Meters: what a training step keeps in memory, and the most that a run holds at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once inside the block, on top of those of its start; no gradients needed.

    Storages that operations make are counted from when they are made until they are freed, each once.

    Example:
        >>> with Peak() as meter:
        ...     x = torch.zeros(100)
        ...     y = x + 1
        ...     del x
        ...     z = y[:50] * 2
        >>> meter.peak, meter.now
        (800, 600)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages it made."""
        found = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for made in tree_leaves(found):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = weakref.finalize(
                        storage, self._freed, storage._cdata, storage.nbytes()
                    )
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return found

    def _freed(self, key: int, size: int) -> None:
        self.alive.pop(key, None)
        self.now -= size
