"""The base below the grafts on a model: its numbers, and whether it is the one a graft was made on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.checksum import checksum
from neurograft.core.grafts.contents import Contents
from neurograft.core.grafts.coordinates import Coordinates, everything, holders
from neurograft.core.grafts.fits import named, other_base, wrong_shape
from neurograft.core.grafts.ledger import Ledger
from neurograft.core.region import Region, as_matrix


@dataclass
class Below:
    """The base of a model with grafts on.

    Where `weights` may be given they are the model's `holders`, which who asks for many tensors looks up once: a bank
    of experts is thousands of them.

    Args:
        ledgers: parameter name -> what happened to it.
        digests: checkpoint tensor -> its digest in the base.
        known: checkpoint tensor -> a checksum of it in the base, and the digest it had then.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    known: dict[str, tuple[int, str]] = field(default_factory=dict)

    def original(self, parameter: str, weight: Tensor, region: Region) -> Tensor:
        """Return the base's numbers of a region, whatever lies on top of them, in its dtype, on the CPU."""
        ledger, found = self.ledgers.get(parameter), region.read(weight).cpu()
        return found if ledger is None else ledger.under(region, found)

    def unrounded(self, parameter: str, weight: Tensor, region: Region) -> Tensor:
        """Return the current numbers of a region before their rounding to the parameter's dtype, float32 or 64."""
        return self.ledgers[parameter].numbers(region, self.original(parameter, weight, region))

    def numbers(
        self,
        tensor: str,
        region: Region,
        model: nn.Module,
        where: Coordinates,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the base's numbers of a checkpoint tensor's region, on the CPU."""
        weights, found = holders(model) if weights is None else weights, None
        for piece in where.to_module(tensor, region):
            values = self.original(piece.name, weights[piece.name], piece.region)
            if piece.order is None:
                return values.reshape(region.values_shape)
            found = torch.empty(region.numel, dtype=values.dtype) if found is None else found
            piece.give(values, found)
        assert found is not None
        return found.reshape(region.values_shape)

    def base(
        self, tensor: str, model: nn.Module, where: Coordinates, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return a checkpoint tensor as the base has it; the model's own storage where nothing lies on it."""
        shape = where.shape(tensor)
        whole = everything(shape, as_matrix(shape))
        # Only a stack with grafts has to look where the tensor lies.
        if self.ledgers and any(p.name in self.ledgers for p in where.to_module(tensor, whole)):
            return self.numbers(tensor, whole, model, where, weights)
        return where.read(tensor)

    def digest(
        self, tensor: str, model: nn.Module, where: Coordinates, weights: Mapping[str, Tensor] | None = None
    ) -> str:
        """Return the digest of a checkpoint tensor in the base."""
        if tensor not in self.digests:
            before = self.known.get(tensor)
            if before and before[0] == self.checksum(tensor, model, where, weights):
                self.digests[tensor] = before[1]
            else:
                self.known.pop(tensor, None)
                self.digests[tensor] = tensor_digest(self.base(tensor, model, where, weights))
        return self.digests[tensor]

    def checksum(
        self, tensor: str, model: nn.Module, where: Coordinates, weights: Mapping[str, Tensor] | None = None
    ) -> int | None:
        """Return a checksum of a checkpoint tensor in the base; None if it is no run of rows of one parameter."""
        shape = where.shape(tensor)
        pieces = where.to_module(tensor, everything(shape, as_matrix(shape)))
        rows = _rows(pieces[0].region) if len(pieces) == 1 and pieces[0].order is None else None
        if rows is None:
            return None
        name, matrix = pieces[0].name, pieces[0].region.matrix
        weight, ledger = (holders(model) if weights is None else weights)[name], self.ledgers.get(name, Ledger())
        return checksum(weight, rows, matrix, ledger.originals()) if weight.is_contiguous() else None

    def remember(self, model: nn.Module, where: Coordinates, weights: Mapping[str, Tensor]) -> None:
        """Note by what a later graft can tell that the tensors digested since `forget` are still the same."""
        for tensor, digest in self.digests.items():
            if tensor not in self.known:
                found = self.checksum(tensor, model, where, weights)
                if found is not None:
                    self.known[tensor] = found, digest

    def check(
        self,
        tensor: str,
        graft: Contents,
        model: nn.Module,
        where: Coordinates,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Raise unless a tensor of the base is the one a graft was made on.

        Raises:
            RequestError: another shape or other numbers.
        """
        name = named(tensor, graft, where)
        shape = where.shape(name)
        if shape != graft.deltas[tensor].shape:
            raise wrong_shape(tensor, graft.deltas[tensor].shape, shape, graft)
        if self.digest(name, model, where, weights) != graft.base.get(tensor):
            raise other_base(tensor, graft)


def _rows(region: Region) -> range | None:
    """Return a region as neighbouring rows, if that is what it is."""
    if region.layout == "all":
        return range(region.matrix[0] * region.matrix[1])
    if region.layout != "rows" or not len(region.ids):
        return None
    first, last = int(region.ids[0]), int(region.ids[-1])
    return range(first, last + 1) if last - first + 1 == len(region.ids) else None
