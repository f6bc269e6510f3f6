"""Values left behind when a training turns to other units: they stay where they are and stop moving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from neurograft.core.compact.live import Live
from neurograft.core.overlap import shared
from neurograft.core.region import Layout, Region, positions, union


@dataclass(frozen=True)
class Settled:
    """Entries of one weight that are or were trained.

    Args:
        region: which; on the CPU, as everything here.
        original: what the base holds there, in the base's dtype.
        values: what they hold now, float32 (float64 for a float64 base).
    """

    region: Region
    original: Tensor
    values: Tensor

    @staticmethod
    def of(region: Region, original: Tensor, values: Tensor) -> Settled:
        """Return entries that are trained as they are now, on the CPU."""
        return Settled(region.to("cpu"), original.cpu(), values.detach().cpu().clone())

    def joined(self, newer: Settled) -> Settled:
        """Return the entries of both; where they overlap, the newer values and the base's numbers.

        Example:
            >>> old = Settled(Region.of((4,), "flat", [0, 1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
            >>> new = Settled(Region.of((4,), "flat", [1, 3]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 3.0]))
            >>> old.joined(new).region.ids.tolist(), old.joined(new).values.tolist()
            ([0, 1, 3], [1.0, 2.0, 3.0])
        """
        region = union([self.region, newer.region])
        original = torch.empty(region.numel, dtype=self.original.dtype)
        values = torch.empty(region.numel, dtype=self.values.dtype)
        for part in (self, newer):
            where = positions(part.region, region)
            values[where] = part.values.reshape(-1)
            original[where] = part.original.reshape(-1)
        return Settled(region, original.reshape(region.values_shape), values.reshape(region.values_shape))

    def overlay(self, live: Live) -> None:
        """Let a live weight go on from these values, and remember the base's numbers under them."""
        inside, here = shared(live.region.to("cpu"), self.region)
        for target, source in ((live.theta.data, self.values), (live.original, self.original)):
            target.view(-1)[inside.to(target.device)] = source.reshape(-1)[here].to(target.device)


def packed(settled: Mapping[str, Settled], live: Mapping[str, Region]) -> dict[str, Tensor]:
    """Return what a checkpoint needs beside the live values: which entries are live, and what was left behind."""
    found: dict[str, Tensor] = {}
    for name, region in live.items():
        found[f"live::{_label(region)}::{name}"] = region.ids.cpu()
    for name, past in settled.items():
        found[f"left::{_label(past.region)}::{name}"] = past.region.ids.cpu()
        found[f"values::{name}"] = past.values
    return found


def unpacked(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, int, int]]]
) -> tuple[dict[str, Region], dict[str, tuple[Region, Tensor]]]:
    """Return what `packed` held: the live regions, and what was left behind with its values.

    Args:
        state: a checkpoint's tensors.
        shapes: shape and matrix of every weight that may be named.
    """
    live: dict[str, Region] = {}
    left: dict[str, tuple[Region, Tensor]] = {}
    for key, ids in state.items():
        kind, _, rest = key.partition("::")
        label, _, name = rest.partition("::")
        if kind in ("live", "left"):
            shape, matrix = shapes[name]
            layout, _, size = label.partition("-")
            block = tuple(int(n) for n in size.split("x")) if size else None
            assert layout in get_args(Layout)
            region = Region.of(shape, layout, ids, matrix=matrix, block=block)  # type: ignore[arg-type]
            if kind == "live":
                live[name] = region
            else:
                left[name] = (region, state[f"values::{name}"])
    return live, left


def _label(region: Region) -> str:
    return region.layout if region.block is None else f"{region.layout}-{region.block[0]}x{region.block[1]}"
