"""Meters: what a training step keeps in memory, and what is alive at once."""

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


class Alive(TorchDispatchMode):
    """The bytes of tensors that operations made and somebody still holds.

    `now` and `peak` count each storage once, whichever views share it; what existed before is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _plain(x)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if _plain(x) and x.untyped_storage()._cdata not in given | self._known:
                self._count(x.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided


def alive() -> Alive:
    """Return a context manager that counts the bytes of tensors made inside it while they are held.

    What an operation uses inside itself is not seen.

    Example:
        >>> with alive() as meter:
        ...     a = torch.ones(8)  # 32 bytes
        ...     b = a.double()  # 64 more
        ...     del b
        ...     c = a.view(2, 4) + 1  # a view owns nothing; 32 more than a
        >>> meter.now, meter.peak
        (64, 96)
    """
    return Alive()
