"""Units: which numbers of which parameters belong to a neuron, a head, an expert, a row, a weight.

Shape letters: n units, E matrices in a bank (1 for an ordinary weight), R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from neurograft.core.kinds import KINDS as KINDS


@dataclass(frozen=True)
class Part:
    """The numbers that n units own in one parameter, as a strided view of its storage.

    Unit i owns the entries `start + offset(i) + r * repeat_stride + c` for r < `repeat` and c < `run`,
    where `offset` reads i as mixed-radix digits over `units`. Almost every kind has one digit; a grid
    of blocks, or the neurons of all experts of a bank, has two.

    Args:
        param: module name of the parameter, as in `named_parameters()`.
        units: (count, stride) of each digit of a unit's number, slowest first.
        repeat: how many runs a unit has.
        run: how many neighbouring entries a run has.
        repeat_stride: distance between two runs of a unit.
        start: first entry of unit 0.

    Example:
        >>> rows = Part.rows("w", (4, 3))
        >>> rows.flat(torch.tensor([2])).tolist()
        [[6, 7, 8]]
        >>> Part.columns("w", (4, 3)).flat(torch.tensor([2])).tolist()
        [[2, 5, 8, 11]]
    """

    param: str
    units: tuple[tuple[int, int], ...]
    repeat: int = 1
    run: int = 1
    repeat_stride: int = 0
    start: int = 0

    @property
    def n(self) -> int:
        """How many units there are."""
        return math.prod(count for count, _ in self.units)

    @property
    def size(self) -> int:
        """How many numbers one unit owns here."""
        return self.repeat * self.run

    def offsets(self, ids: Tensor) -> Tensor:
        """Return the first entry of each unit, int64 [k]."""
        rest, at = ids.to(torch.int64), torch.full_like(ids, self.start, dtype=torch.int64)
        for count, stride in reversed(self.units):
            at = at + (rest % count) * stride
            rest = rest // count
        return at

    def flat(self, ids: Tensor) -> Tensor:
        """Return the flat entry numbers of the given units, int64 [k, size], a unit's own order."""
        runs = torch.arange(self.repeat, device=ids.device) * self.repeat_stride
        entries = (runs[:, None] + torch.arange(self.run, device=ids.device)).reshape(-1)
        return self.offsets(ids)[:, None] + entries

    def read(self, weight: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the units' numbers, [k, size], copied from a contiguous `weight`."""
        chosen = torch.arange(self.n, device=weight.device) if ids is None else ids.to(weight.device)
        if len(self.units) == 1:
            (count, stride), (rep, run) = self.units[0], (self.repeat, self.run)
            view = weight.detach().as_strided(
                (count, rep, run), (stride, self.repeat_stride, 1), weight.storage_offset() + self.start
            )
            return view[chosen].reshape(len(chosen), self.size)
        return weight.detach().reshape(-1)[self.flat(chosen)]

    @staticmethod
    def rows(param: str, matrix: tuple[int, ...], *, start: int = 0, count: int | None = None, width: int = 1) -> Part:
        """Units that are `width` neighbouring rows each, from row `start`, of an [R, C] or [E, R, C] weight."""
        columns = matrix[-1]
        total = math.prod(matrix[:-1]) - start if count is None else count * width
        return Part(param, ((total // width, width * columns),), run=width * columns, start=start * columns)

    @staticmethod
    def columns(
        param: str, matrix: tuple[int, ...], *, start: int = 0, count: int | None = None, width: int = 1, bank: int = 0
    ) -> Part:
        """Units that are `width` neighbouring columns each, from column `start`, of matrix `bank` of the weight."""
        rows, columns = matrix[-2], matrix[-1]
        total = (columns - start) // width if count is None else count
        return Part(
            param,
            ((total, width),),
            repeat=rows,
            run=width,
            repeat_stride=columns,
            start=bank * rows * columns + start,
        )

    @staticmethod
    def entries(param: str, numel: int, *, start: int = 0, count: int | None = None, width: int = 1) -> Part:
        """Units that are `width` neighbouring entries each."""
        return Part(param, (((numel - start) // width if count is None else count, width),), run=width, start=start)

    @staticmethod
    def blocks(param: str, matrix: tuple[int, int], size: tuple[int, int]) -> Part:
        """Units that are the blocks of a grid, numbered row by row; the size must divide the matrix."""
        (rows, columns), (high, wide) = matrix, size
        return Part(
            param,
            ((rows // high, high * columns), (columns // wide, wide)),
            repeat=high,
            run=wide,
            repeat_stride=columns,
        )

    @staticmethod
    def whole(param: str, numel: int) -> Part:
        """One unit that owns the whole parameter."""
        return Part(param, ((1, numel),), run=numel)


@dataclass(frozen=True)
class Tap:
    """Where the activations of a site's units pass.

    Args:
        module: name of the module whose input or output carries them.
        side: "input" or "output".
        start: first feature of unit 0.
        width: features of one unit.
        stride: distance between two units' first features.
        dim: the feature axis: -1 for [..., features], 1 for convolution maps.
        index: which positional input, or which element of a tuple output.
        expert: for a fused bank, the expert whose hidden neurons these are; `module` is then the
            experts module and the activation is what enters its `down_proj`.
    """

    module: str
    side: str = "output"
    start: int = 0
    width: int = 1
    stride: int = 1
    dim: int = -1
    index: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class Site:
    """n like units in one place.

    Args:
        name: `<module path>/<kind>` or `<module path>/<kind>@<at>`; unique in a model.
        kind: one of `KINDS`.
        n: how many units.
        parts: what they own; the first part that writes to the residual stream is marked by `writes`.
        tap: where their activations pass, or None.
        layer: index of the transformer block, or None outside of blocks.
        at: which of a kind's several activations `tap` means.
        writes: positions in `parts` of the numbers a unit writes its output with.
    """

    name: str
    kind: str
    n: int
    parts: tuple[Part, ...] = ()
    tap: Tap | None = None
    layer: int | None = None
    at: str = ""
    writes: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        found = {k: v for k, v in vars(self).items() if k not in ("parts", "tap")}
        return found | {"parts": [vars(p) for p in self.parts], "tap": vars(self.tap) if self.tap else None}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Site:
        """Read what `as_dict` wrote."""
        parts = tuple(Part(**{**p, "units": tuple(tuple(u) for u in p["units"])}) for p in data["parts"])
        tap = Tap(**data["tap"]) if data["tap"] else None
        return Site(**{**data, "parts": parts, "tap": tap, "writes": tuple(data["writes"])})

    def with_parts(self, *keep: int) -> Site:
        """Return the site with only some of its parts, for methods that move a part of each unit."""
        moved = {old: new for new, old in enumerate(keep)}
        writes = tuple(moved[w] for w in self.writes if w in moved)
        return replace(self, parts=tuple(self.parts[i] for i in keep), writes=writes)


def census(sites: Mapping[str, Site], ids: Mapping[str, Tensor] | None = None) -> int:
    """Return how many numbers the given units own, parts counted one by one.

    Example:
        >>> census({"a": Site("a", "row", 4, (Part.rows("w", (4, 3)),))})
        12
    """
    total = 0
    for name, site in sites.items():
        units = site.n if ids is None else len(ids.get(name, ()))
        total += units * sum(part.size for part in site.parts)
    return total


@dataclass
class Parameters:
    """The parameters of a model by module name, with tied names folded onto the first one.

    Args:
        by_name: first name -> parameter.
        alias: every name -> first name.
    """

    by_name: dict[str, torch.nn.Parameter] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(model: torch.nn.Module) -> Parameters:
        """Read a model's parameters; two names of one object are one parameter."""
        found = Parameters()
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            key = first.setdefault(id(parameter), name)
            found.alias[name] = key
            found.by_name.setdefault(key, parameter)
        return found

    def tied(self, name: str) -> list[str]:
        """Return the other names of this parameter."""
        return [other for other, key in self.alias.items() if key == self.alias[name] and other != name]
