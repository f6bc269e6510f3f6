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
        flat, lo = into.detach().view(-1), 0
        for piece in self.pieces(name):
            flat[lo : lo + len(piece)].copy_(piece)
            lo += len(piece)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's numbers in order, flat, in pieces of at most a MiB: whole tensors read one after another
        leave holes behind in the allocator, which grow to half a model."""
        place, shape, dtype = self.index[name]
        self.file.seek(place)
        left = math.prod(shape)
        while left:
            count = min(left, CHUNK // dtype.itemsize)
            yield torch.frombuffer(bytearray(self.file.read(count * dtype.itemsize)), dtype=dtype)
            left -= count

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


def differing(held: Mapping[str, Tensor], name: str, now: Tensor) -> int:
    """Return how many numbers of a tensor differ from the copy of it that is held.

    Example:
        >>> held = Spill({"w": torch.tensor([1.0, 2.0, 3.0])})
        >>> differing(held, "w", torch.tensor([1.0, 0.0, 4.0]))
        2
    """
    if not isinstance(held, Spill):
        return int((now.detach() != held[name].to(now.device)).sum())
    flat, lo, found = now.detach().reshape(-1), 0, 0
    for piece in held.pieces(name):
        found += int((flat[lo : lo + len(piece)] != piece.to(flat.device)).sum())
        lo += len(piece)
    return found
