"""Rearrangements: where each number of a tensor comes from, after views, copies and joins.

A tree of strided views, as `Recorder` makes it, is followed in both directions for just the entries that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """A strided view of a source: a parameter (by name), a copy of a view, or a join of views.

    Args:
        source: the name of a parameter, a `View` (its entries row by row), or a `Join`.
        shape: of the view.
        stride: in entries of the source.
        start: first entry in the source.
    """

    source: str | View | Join
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int = 0

    @property
    def numel(self) -> int:
        """How many entries there are."""
        return math.prod(self.shape)

    @property
    def plain(self) -> bool:
        """Whether the view shows neighbouring entries in their order."""
        return self.stride == contiguous(self.shape)

    def leaves(self) -> list[str]:
        """Return the parameters below."""
        if isinstance(self.source, str):
            return [self.source]
        below = [self.source] if isinstance(self.source, View) else list(self.source.parts)
        return list(dict.fromkeys(name for part in below for name in part.leaves()))

    def real(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the content, without a copy where it is a view of one parameter."""
        if isinstance(self.source, str):
            flat = weights[self.source].detach().reshape(-1)
            return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.start)
        if isinstance(self.source, View):
            flat = self.source.real(weights).reshape(-1)
        else:
            flat = torch.cat([p.real(weights) for p in self.source.parts], self.source.dim).reshape(-1)
        return flat.as_strided(self.shape, self.stride, self.start)

    def down(self, ids: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Follow entries of the view to the parameters.

        Args:
            ids: flat entry numbers, int64.

        Returns:
            (parameter, its entries, where each of them stands in `ids`) for every parameter that is reached.
        """
        at = torch.full_like(ids, self.start)
        rest = ids
        for size, stride in zip(reversed(self.shape), reversed(self.stride)):
            at, rest = at + rest % size * stride, rest // size
        if isinstance(self.source, str):
            return [(self.source, at, torch.arange(len(ids)))]
        if isinstance(self.source, View):
            return self.source.down(at)
        found = []
        for part, inside, held in self.source.split(at):
            found += [(name, entries, held[order]) for name, entries, order in part.down(inside)]
        return found

    def up(self, name: str, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Follow entries of a parameter to the view.

        Returns:
            The entries of the view that show one of them, and where that one stands in `entries`.
        """
        if isinstance(self.source, str):
            at, held = (entries, torch.arange(len(entries))) if self.source == name else (entries[:0], entries[:0])
        else:
            at, held = self.source.up(name, entries)
        rest, found, fits = at - self.start, torch.zeros_like(at), at >= self.start
        places = sorted(zip(self.stride, self.shape, contiguous(self.shape)), reverse=True)
        for stride, size, place in places:
            if size == 1:
                continue
            digit, rest = rest // stride, rest % stride
            found, fits = found + digit * place, fits & (digit < size)
        fits &= rest == 0
        return found[fits], held[fits]


@dataclass(frozen=True)
class Join:
    """Views of equal shape but along `dim`, joined there; entries are numbered row by row."""

    parts: tuple[View, ...]
    dim: int

    def split(self, at: Tensor) -> list[tuple[View, Tensor, Tensor]]:
        """Return for each part: it, its entries among `at`, and where they stand there."""
        inner = math.prod(self.parts[0].shape[self.dim + 1 :])
        total = sum(p.shape[self.dim] for p in self.parts)
        low, along, outer = at % inner, at // inner % total, at // (inner * total)
        found: list[tuple[View, Tensor, Tensor]] = []
        edge = 0
        for part in self.parts:
            size = part.shape[self.dim]
            held = ((along >= edge) & (along < edge + size)).nonzero().reshape(-1)
            inside = (outer[held] * size + along[held] - edge) * inner + low[held]
            found, edge = [*found, (part, inside, held)], edge + size
        return found

    def up(self, name: str, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Follow entries of a parameter to the join."""
        inner = math.prod(self.parts[0].shape[self.dim + 1 :])
        total = sum(p.shape[self.dim] for p in self.parts)
        places, holders, edge = [], [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            at, held = part.up(name, entries)
            low, along, outer = at % inner, at // inner % size, at // (inner * size)
            places.append((outer * total + along + edge) * inner + low)
            holders.append(held)
            edge += size
        return torch.cat(places), torch.cat(holders)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor.

    Example:
        >>> contiguous((2, 3, 4))
        (12, 4, 1)
    """
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def simplified(view: View) -> View:
    """Drop copies that change nothing between a view and its source.

    Example:
        >>> copied = View(View("w", (2, 3), (3, 1), 6), (2,), (3,), 1)
        >>> simplified(copied)
        View(source='w', shape=(2,), stride=(3,), start=7)
    """
    while isinstance(view.source, View):
        copied = view.source
        if copied.plain:
            view = View(copied.source, view.shape, view.stride, view.start + copied.start)
            continue
        part = _one_of(view, copied)
        if part is None:
            return view
        view = part
    return view


def _one_of(view: View, copied: View) -> View | None:
    """Return a view as a part of what was copied, if it is one of the neighbours along the outer axes."""
    if not view.plain or view.start % max(view.numel, 1):
        return None
    for axis in range(len(copied.shape) + 1):
        inner = copied.shape[axis:]
        if math.prod(inner) != view.numel:
            continue
        at, rest = copied.start, view.start // view.numel
        for size, stride in zip(reversed(copied.shape[:axis]), reversed(copied.stride[:axis])):
            at, rest = at + rest % size * stride, rest // size
        part = View(copied.source, inner, copied.stride[axis:], at)
        if inner == view.shape:
            return part
        if part.plain:
            return View(copied.source, view.shape, view.stride, at)
    return None
