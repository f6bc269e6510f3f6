"""Tensors set aside in a scratch file, so that they take no memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

CHUNK = 1 << 20  # bytes


class Spill(Mapping[str, Tensor]):
    """Copies of tensors, bit for bit, in an unnamed file in the system's temporary folder (`TMPDIR` says where).

    Example:
        >>> held = Spill({"w": torch.arange(3.0), "b": torch.ones(2, 2).bfloat16()})
        >>> held["w"].tolist(), held["b"].dtype
        ([0.0, 1.0, 2.0], torch.bfloat16)
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.file = tempfile.TemporaryFile(prefix="neurograft-")  # noqa: SIM115
        self.index: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        for name, tensor in tensors.items():
            self.index[name] = (self.file.tell(), tensor.shape, tensor.dtype)
            for part in tensor.detach().reshape(-1).split(CHUNK // tensor.element_size()):
                self.file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)
        self.file.flush()

    def put(self, name: str, into: Tensor) -> None:
        """Write a tensor's copy into a contiguous tensor of its shape and dtype, a piece at a time."""
        place, _, dtype = self.index[name]
        self.file.seek(place)
        for part in into.detach().view(-1).split(CHUNK // dtype.itemsize):
            here = bytearray(self.file.read(part.numel() * dtype.itemsize))
            part.copy_(torch.frombuffer(here, dtype=dtype))

    def __getitem__(self, name: str) -> Tensor:
        _, shape, dtype = self.index[name]
        found = torch.empty(shape, dtype=dtype)
        if math.prod(shape):
            self.put(name, found)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)
