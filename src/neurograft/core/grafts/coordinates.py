"""Between a model's parameters and the tensors of its checkpoint.

Checkpoints may name, cut and join tensors differently from the modules that hold them. A `Coordinates`
translates both ways; `neurograft.anatomy.checkpoint` provides the one of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, near
from neurograft.core.marks import CHILD
from neurograft.core.region import Region, as_matrix
from neurograft.core.resolve import resolve
from neurograft.core.units import Parameters


@dataclass(frozen=True)
class Piece:
    """Part of a region on the other side of the translation.

    Args:
        name: tensor (or parameter) name there.
        region: its entries there.
        order: for each value there, in order, its place among our flattened values: numbers, or a slice where
            they are neighbours; None if all of them agree.
    """

    name: str
    region: Region
    order: Tensor | slice | None = None

    def take(self, values: Tensor) -> Tensor:
        """Return our values in the order and shape of this piece."""
        if self.order is None:
            return values.reshape(self.region.values_shape)
        if isinstance(self.order, slice):
            return values.reshape(-1)[self.order].reshape(self.region.values_shape)
        return values.reshape(-1)[self.order.to(values.device)].reshape(self.region.values_shape)

    def give(self, values: Tensor, into: Tensor) -> None:
        """Put this piece's values, in its order, among our flattened values `into`."""
        into[slice(None) if self.order is None else self.order] = values.reshape(-1).to(into.dtype)


class Coordinates(Protocol):
    """What a translation offers."""

    def to_checkpoint(self, parameter: str, region: Region) -> list[Piece]:
        """Return where entries of a parameter lie in the checkpoint."""

    def to_module(self, tensor: str, region: Region) -> list[Piece]:
        """Return where entries of a checkpoint tensor lie in the model; RequestError if it has no such tensor."""

    def read(self, tensor: str) -> Tensor:
        """Return a checkpoint tensor's current content from the model."""

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return a checkpoint tensor's shape."""

    def modules(self, tensor: str) -> list[str]:
        """Return the parameters that hold a checkpoint tensor."""

    def resolve(self, tensor: str) -> str:
        """Return the checkpoint's name of a tensor that may be named otherwise; RequestError if there is none."""

    def names(self) -> dict[str, tuple[int, ...]]:
        """Return the checkpoint's tensors with their shapes."""


class Same:
    """The translation of a model whose checkpoint is its own state: parameters and persistent buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = Parameters.of(model)
        self.buffers = buffers(model)

    def to_checkpoint(self, parameter: str, region: Region) -> list[Piece]:
        """Return the region itself."""
        return [Piece(self.resolve(parameter), region)]

    def to_module(self, tensor: str, region: Region) -> list[Piece]:
        """Return the region itself."""
        return [Piece(self.resolve(tensor), region)]

    def read(self, tensor: str) -> Tensor:
        """Return the parameter."""
        name = self.resolve(tensor)
        held = self.parameters.by_name.get(name)
        return (self.buffers[name] if held is None else held).detach()

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the parameter's shape."""
        return tuple(self.read(tensor).shape)

    def names(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters and buffers with their shapes."""
        return {n: tuple(p.shape) for n, p in {**self.parameters.by_name, **self.buffers}.items()}

    def modules(self, tensor: str) -> list[str]:
        """Return the parameter."""
        return [self.resolve(tensor)]

    def resolve(self, tensor: str) -> str:
        """Return the first name of a parameter."""
        if tensor in self.buffers:
            return tensor
        if tensor not in self.parameters.alias:
            raise missing(tensor, self.parameters.alias)
        return self.parameters.alias[tensor]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint holds, by name."""
    found = {}
    for prefix, module in model.named_modules():
        for leaf, tensor in module._buffers.items():
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{prefix}.{leaf}" if prefix else leaf] = tensor
    return found


def holders(model: nn.Module) -> dict[str, Tensor]:
    """Return what a graft may change, by first name: the parameters and the buffers a checkpoint holds.

    The trainable tensors of a live model are not among them: they follow weights that are.
    """
    found = {n: p for n, p in Parameters.of(model).by_name.items() if not n.startswith(CHILD)}
    return {**buffers(model), **found}


def missing(tensor: str, known: object) -> RequestError:
    """Return the error for a graft tensor that the model does not have."""
    return RequestError(
        f"a graft for the tensor {tensor!r}",
        expected="a tensor of this model",
        do=f"load the base model the graft was made for ({near(tensor, known)})",  # type: ignore[arg-type]
    )


def coordinates(model: nn.Module) -> Coordinates:
    """Return the translation that fits a model."""
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        found: Coordinates = resolve("neurograft.anatomy.checkpoint.CheckpointMap")(model)
        return found
    return Same(model)


def everything(shape: tuple[int, ...], matrix: tuple[int, int, int]) -> Region:
    """Return the region of a whole tensor."""
    return Region(shape, matrix, "all", torch.empty(0, dtype=torch.int64))


def narrowest(
    shape: tuple[int, ...], entries: Tensor, matrix: tuple[int, int, int] | None = None
) -> tuple[Region, Tensor]:
    """Return the narrowest region that holds just these entries, and where each of its values stands among them.

    Args:
        shape: the tensor's shape.
        entries: flat entry numbers, int64, unique, in any order.
        matrix: how the tensor is read as matrices, if not as `as_matrix` reads it.

    Example:
        >>> region, order = narrowest((4, 3), torch.tensor([7, 6, 8]))
        >>> region.layout, region.ids.tolist(), order.tolist()
        ('rows', [2], [1, 0, 2])
    """
    matrix = matrix or as_matrix(shape)
    _, rows, columns = matrix
    held, order = entries.sort()
    if len(held) == math.prod(shape):
        return everything(shape, matrix), order
    if len(shape) > 1 and len(held) and len(held) % columns == 0:
        runs = held.view(-1, columns)
        if bool((runs[:, :1] % columns == 0).all()) and bool((runs[:, -1:] - runs[:, :1] == columns - 1).all()):
            return Region.of(shape, "rows", runs[:, 0] // columns, matrix=matrix), order
    if len(shape) > 1 and len(held) and len(held) % rows == 0:
        column = held // (rows * columns) * columns + held % columns
        key = column * rows + held // columns % rows
        down, again = key.sort()
        runs = down.view(-1, rows)
        if bool((runs[:, :1] % rows == 0).all()) and bool((runs[:, -1:] - runs[:, :1] == rows - 1).all()):
            return Region.of(shape, "cols", runs[:, 0] // rows, matrix=matrix), order[again]
    return Region.of(shape, "flat", held, matrix=matrix), order
