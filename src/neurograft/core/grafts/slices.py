"""Changes of chosen entries of a parameter: their new values, or 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurograft.core.grafts.coordinates import Piece
from neurograft.core.overlap import Index
from neurograft.core.region import Region, as_matrix


@dataclass(frozen=True)
class Entries:
    """Something about some entries of a parameter.

    Args:
        region: which entries.
    """

    region: Region

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.region.shape

    @property
    def numel(self) -> int:
        """How many numbers change."""
        return self.region.numel

    def places(self) -> dict[str, Tensor]:
        """Return the entries' numbers under the name of their layout; none if they are all there are."""
        region = self.region
        found: dict[str, Tensor] = {} if region.layout == "all" else {region.layout: region.ids}
        if region.layout == "cols" and region.matrix != as_matrix(region.shape):
            found["matrix"] = torch.tensor(region.matrix)  # a bank read as one matrix numbers other columns so
        return found


@dataclass(frozen=True)
class Slice(Entries):
    """New values for the entries of a region; a region of layout "all" is a dense change.

    Args:
        region: which entries.
        values: their new values, float32 (float64 for a float64 base), shaped `region.values_shape`.

    Example:
        >>> s = Slice(Region.of((2, 3), "rows", [1]), torch.ones(1, 3))
        >>> s.numel
        3
    """

    values: Tensor

    def tensors(self) -> dict[str, Any]:
        """Return the tensors that describe the change, for digests and files."""
        return {"value": self.values, **self.places()}

    def on(self, base: Tensor) -> Slice:
        """Return the change as a slice, given the base's tensor."""
        return self

    def at(self, piece: Piece) -> Slice:
        """Return the change, or the part of it that lies in a piece, where the piece lies."""
        return Slice(piece.region, piece.take(self.values))

    def after(self, before: Tensor, at: Index) -> Tensor:
        """Return new values, [k, run]: those of the runs `at` of the region's values, whose numbers were `before`."""
        return self.values.detach().reshape(-1, before.shape[1])[at].to("cpu", before.dtype)


class Shut(Slice):
    """Entries of a parameter set to 0: a slice without values of its own.

    A file holds a bit for each entry of the tensor, or the numbers of the shut ones, whichever is shorter.

    Args:
        region: which entries.

    Example:
        >>> shut = Shut(Region.of((2, 3), "flat", [0, 4]))
        >>> shut.values.tolist(), shut.numel, sorted(shut.tensors())
        ([0.0, 0.0], 2, ['flat'])
    """

    def __init__(self, region: Region) -> None:
        flat = region if region.layout == "flat" else region.flattened()[0]
        super().__init__(flat, torch.zeros(()).expand(flat.values_shape))  # one number, whatever the shape

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that describe the change."""
        return {"flat": self.region.ids}

    def after(self, before: Tensor, at: Index) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(before)

    def at(self, piece: Piece) -> Shut:
        """Return the change, or the part of it that lies in a piece, where the piece lies."""
        return Shut(piece.region)
