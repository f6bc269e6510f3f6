"""Interventions as weight changes, where that is exact.

The written vector of a unit is what its activation is multiplied with on the way out (columns of `down_proj`), or
what produces it (rows of `gate_proj` and their bias), depending on the side of the module the tap is at.
Shape letters: k chosen units, w features of a unit, m the other side of the module's matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neurograft.core.compact.mount import matrix_of
from neurograft.core.errors import RequestError
from neurograft.core.grafts.combined import merged
from neurograft.core.grafts.coordinates import coordinates
from neurograft.core.grafts.delta import Delta, Slice
from neurograft.core.grafts.operation import Operation
from neurograft.core.grafts.stack import Stack
from neurograft.core.region import Region, region_of, union
from neurograft.core.units import Parameters, Part, Site, Tap


def folded(model: nn.Module, site: Site, ids: Tensor, kind: str, value: Tensor | None) -> dict[str, Slice]:
    """Return an intervention at every token as weight changes by parameter.

    Args:
        model: the base, or a model with grafts on it: the base's numbers are read.
        site: where.
        ids: which units, [k].
        kind: zero, scale, pin, add, replace, rotate or remove.
        value: as in `core.intervene.Intervention`.

    Raises:
        RequestError: it does not fold, with the reason.
    """
    if kind == "remove":
        raise RequestError(
            f"directions removed at {site.name}, as a weight change",
            expected="zero, scale, pin, add, replace or rotate",
            do="keep it as an operation of the graft",
        )
    fold = _Fold(model, site, ids, kind, value)
    if kind in ("zero", "scale"):
        fold.scale(torch.zeros(()) if value is None else value)
    else:
        assert value is not None
        if kind == "rotate":
            fold.rotate(value)
        else:
            fold.shift(value, keep=kind == "add")
    return fold.slices()


def as_deltas(model: nn.Module, operations: Iterable[Operation]) -> dict[str, Delta]:
    """Return operations as weight changes by tensor of the checkpoint, where all of them fold exactly.

    Raises:
        RequestError: one does not, with the reason.
    """
    pieces: dict[str, list[tuple[Slice, float]]] = {}
    where = coordinates(model)
    for operation in operations:
        for name, change in operation.fold(model).items():
            for piece in where.to_checkpoint(name, change.region):
                pieces.setdefault(piece.name, []).append((Slice(piece.region, piece.take(change.values)), 1.0))
    return {n: s[0][0] if len(s) == 1 else merged(s, None) for n, s in sorted(pieces.items())}


@dataclass
class _Fold:
    model: nn.Module
    site: Site
    ids: Tensor
    kind: str
    value: Tensor | None
    changes: dict[str, list[tuple[Region, Tensor, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.site.tap is not None
        self.tap: Tap = self.site.tap
        self.found = Parameters.of(self.model)
        self.writes = [self.site.parts[i] for i in self.site.writes]
        self.numbers: dict[Part, Tensor] = {}
        if not self.writes:
            raise self.refused("no weight of its own produces or carries this activation")

    def refused(self, why: str) -> RequestError:
        return RequestError(
            f"{self.kind} of {len(self.ids)} units at {self.site.name} as a weight change: {why}",
            expected="an intervention that some weights can express exactly",
            do="keep it as an operation of the graft, or intervene where the units are multiplied with weights",
        )

    def read(self, part: Part, ids: Tensor | None = None) -> Tensor:
        """Return the chosen units' numbers in the base, [k, size], float32 (float64 for such a base)."""
        ids = self.ids if ids is None else ids
        name = self.found.alias[part.param]
        tied = self.found.tied(part.param)
        if tied:
            raise self.refused(f"{part.param} is tied to {tied[0]}, which would change too")
        weight = self.found.by_name[name]
        entries = part.flat(ids).reshape(-1)
        flat = Region.of(tuple(weight.shape), "flat", entries, matrix=self._matrix(name))
        numbers = Stack.of(self.model).original(name, weight, flat)
        numbers = numbers if numbers.dtype == torch.float64 else numbers.float()
        # A region sorts its entries; bring them back into the units' own order.
        return torch.empty_like(numbers).index_copy_(0, entries.argsort(), numbers).reshape(len(ids), part.size)

    def _matrix(self, name: str) -> tuple[int, int, int]:
        return matrix_of(self.model, name, tuple(self.found.by_name[name].shape))

    def change(self, part: Part, numbers: Tensor, ids: Tensor | None = None) -> None:
        """Note new numbers of the chosen units, [k, size]."""
        ids = self.ids if ids is None else ids
        name = self.found.alias[part.param]
        region = region_of(part, ids, tuple(self.found.by_name[name].shape), self._matrix(name))
        self.changes.setdefault(name, []).append((region, part.flat(ids).reshape(-1), numbers.reshape(-1)))

    def slices(self) -> dict[str, Slice]:
        """Return the noted changes as slices."""
        found = {}
        for name, pieces in self.changes.items():
            region = union(r for r, _, _ in pieces)
            entries, numbers = torch.cat([e for _, e, _ in pieces]), torch.cat([v for _, _, v in pieces])
            order = entries.argsort()
            at = torch.searchsorted(entries[order], region.flat())
            found[name] = Slice(region, numbers[order][at].reshape(region.values_shape))
        return found

    def scale(self, factor: Tensor) -> None:
        """Multiply every number the units write with."""
        self._adjacent()
        for part in self.writes:
            numbers = self.read(part)
            each = factor.to(numbers.dtype)
            if each.dim() == 2:  # one factor for each feature
                grid = self.vectors(part, numbers)
                self.change(part, self.unvectors(part, grid * each[:, :, None]))
            else:
                self.change(part, numbers * (each[:, None] if each.dim() == 1 else each))

    def rotate(self, turn: Tensor) -> None:
        """Turn the written vectors: x @ R @ M = x @ (R @ M); behind the module its rows turn the other way."""
        self._adjacent()
        for part in self.writes:
            numbers = self.read(part)
            grid, turned = self.vectors(part, numbers), turn.to(numbers.dtype)
            turned = turned if self.tap.side == "input" else turned.mT
            new = (turned @ grid[:, 0])[:, None] if self.tap.width == 1 else turned @ grid
            self.change(part, self.unvectors(part, new))

    def shift(self, value: Tensor, *, keep: bool) -> None:
        """Move a constant into the bias: of the units themselves, or of what they write to."""
        self._adjacent()
        wide = (value[:, None] if value.dim() == 1 else value).expand(len(self.ids), self.tap.width)
        if self.tap.side == "output":
            biases = [p for p in self.writes if self._is_bias(p)]
            if not biases:
                raise self.refused(f"{self.tap.module} has no bias to hold the value")
            for part in self.writes:
                numbers = self.read(part)
                if part in biases:
                    self.change(part, (numbers if keep else 0 * numbers) + wide.to(numbers.dtype))
                elif not keep:
                    self.change(part, torch.zeros_like(numbers))
            return
        bias = f"{self.tap.module}.bias"
        if bias not in self.found.alias or self.tap.expert is not None:
            raise self.refused(f"{self.tap.module} has no bias to hold what the value writes")
        total = torch.zeros(())
        for part in self.writes:
            numbers = self.read(part)
            total = total + (wide.to(numbers.dtype)[:, :, None] * self.vectors(part, numbers)).sum((0, 1))
            if not keep:
                self.change(part, torch.zeros_like(numbers))
        whole = Part.entries(bias, self.found.by_name[self.found.alias[bias]].numel())
        if len(total) != whole.n:
            raise self.refused(f"{bias} does not stand at the outputs of the units")
        every = torch.arange(whole.n)
        self.change(whole, self.read(whole, every) + total[:, None], every)

    def _adjacent(self) -> None:
        """Refuse write parts of another module than the tap's, with which only silence is known to agree."""
        for part in self.writes:
            if self.kind != "zero" and part.param.rpartition(".")[0] != self.tap.module:
                raise self.refused(f"the activation passes at {self.tap.module}, its weights are {part.param}")

    def _is_bias(self, part: Part) -> bool:
        return self.found.by_name[self.found.alias[part.param]].dim() == 1 and part.param.endswith("bias")

    def vectors(self, part: Part, numbers: Tensor) -> Tensor:
        """Return [k, size] as the written vectors of each feature, [k, w, m]."""
        w = self.tap.width
        if part.size % w:
            raise self.refused(f"{part.param} does not hold one vector for each feature")
        if part.repeat == 1:
            return numbers.reshape(len(numbers), w, part.size // w)
        if part.run != w:
            raise self.refused(f"{part.param} does not hold one vector for each feature")
        return numbers.reshape(len(numbers), part.repeat, w).transpose(1, 2)

    def unvectors(self, part: Part, grid: Tensor) -> Tensor:
        """Undo `vectors`."""
        flat = grid if part.repeat == 1 else grid.transpose(1, 2)
        return flat.reshape(len(grid), part.size)
