"""Running transformers' conversions on tensors without content, to learn what their results are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neurograft.anatomy._rearranged import Join, View, simplified
from neurograft.core.errors import RequestError

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Runs rearranging operations on empty tensors and remembers what their results are made of.

    Example:
        >>> with Recorder() as seen:
        ...     w = seen.parameter("w", (4, 3))
        ...     top = seen.view(torch.chunk(w, 2)[1].contiguous())
        >>> top.down(torch.tensor([0, 4]))[0][:2]
        ('w', tensor([ 6, 10]))
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, str | View | Join] = {}
        self.alive: list[Tensor] = []  # a storage that died could give its number to another one

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return an empty tensor that stands for a parameter."""
        made = torch.empty(shape, device="meta")
        return self._remember(made, name)

    def view(self, tensor: Tensor) -> View:
        """Return what a tensor is made of."""
        source = self.sources[tensor.untyped_storage()._cdata]
        return simplified(View(source, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())))

    def _remember(self, made: Tensor, source: str | View | Join) -> Tensor:
        self.sources[made.untyped_storage()._cdata] = source
        self.alive.append(made)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.empty.memory_format:
            return out
        if func is aten.clone.default:
            return self._remember(aten.empty.memory_format(out.shape, device="meta"), self.view(args[0]))
        if func in (aten.cat.default, aten.stack.default):
            dim = args[1] if len(args) > 1 else 0
            parts = [p if func is aten.cat.default else p.unsqueeze(dim) for p in args[0]]
            return self._remember(out, Join(tuple(self.view(p) for p in parts), dim % parts[0].dim()))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self.sources:
                raise RequestError(
                    f"a checkpoint conversion with the operation {func}",
                    expected="conversions that only rearrange numbers",
                    do="load the base in a format that needs no conversion (save_original_format=False)",
                )
        return out
