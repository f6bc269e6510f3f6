"""Whole parameters trained themselves: full fine-tuning, or of some modules or layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from neurograft.core.card import method
from neurograft.core.compact.mount import Mount, matrix_of, regions_of
from neurograft.core.compact.shift import Shift
from neurograft.core.compact.spill import Spill, differing
from neurograft.core.context import Trained
from neurograft.core.errors import RequestError, one_of
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.coordinates import everything
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.replay import Replay
from neurograft.core.region import Region
from neurograft.core.selection import Selection


@method(claims={"undo", "only_the_selection", "zero_graft", "live_model", "resume", "coordinates"})
def dense(
    model: nn.Module,
    where: Selection | None = None,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    tied: str = "both",
    originals: Literal["memory", "disk"] = "memory",
) -> Mount:
    """Train whole parameters as they are; their originals are kept once, off the device.

    A gradient-free optimizer looks at them with noise added without ever writing it into them, and the graft is its
    log of seeds and scalars.

    Args:
        model: any module.
        where: units that own whole parameters (modules, layers, all rows of a weight); None for everything.
        new: parameters the base's checkpoint lacks.
        protect: units whose parameters stay frozen, whole.
        tied: "both", as full fine-tuning does, or "refuse".
        originals: where they are kept: in the computer's memory, or in a scratch file that takes none.

    Raises:
        RequestError: a selection holds only a part of a parameter.
    """
    one_of(originals, ("memory", "disk"), what="place for originals")
    names = [n for n, p in model.named_parameters() if p.is_floating_point()]
    if where is not None:
        regions = regions_of(model, where, tied=tied)
        parts = [n for n, r in regions.items() if r.layout != "all"]
        if parts:
            raise RequestError(
                f"a selection of part of {parts[0]}",
                expected="whole parameters for adapter='dense'",
                do="use adapter='slice', or select modules or layers",
            )
        names = list(regions)
    if protect is not None:
        shielded = regions_of(model, protect, tied="both")
        names = [n for n in names if n not in shielded]
    if not names:
        raise RequestError(
            "a selection that touches no parameter outside of the protected one",
            expected="at least one parameter",
            do="select more, or protect less",
        )
    mount = DenseMount(model, names, new=new, spill=originals == "disk")
    mount.declared = where is not None
    return mount


class DenseMount(Mount):
    """Parameters set free, and their originals."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        *,
        new: Iterable[str] | Mapping[str, int] = (),
        spill: bool = False,
        within: Mount | None = None,
    ) -> None:
        super().__init__(model, new=new, within=within)
        self.names, self.spill = [n for n in names if n not in self.new], spill
        self.original = self._kept()
        self.ended: dict[str, Slice | Replay] = {}
        for name in self.names:
            self.found.by_name[name].requires_grad_(True)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters set free."""
        return {n: self.found.by_name[n] for n in self.names}

    def mark(self) -> Mapping[str, torch.Tensor]:
        """Return the trainable tensors as they are now, to see later what has moved."""
        return Spill(self.named_parameters()) if self.spill else super().mark()

    @contextmanager
    def shifted(self, terms: Sequence[tuple[int, float]]) -> Iterator[set[str]]:
        """Let every use of the awake parameters see them shifted; they are not written."""
        assert self.driver is not None
        with torch.no_grad(), Shift(self.driver.awake(), terms, grain=self.driver.grain) as seen:
            yield seen.reached

    def deltas(self) -> dict[str, Slice | Replay]:  # type: ignore[override]
        """Return the parameters that differ from the base, whole: a gradient-free optimizer's as its log."""
        if not self.attached:
            return self.ended
        found: dict[str, Slice | Replay] = {}
        for name in self.names:
            now = self.found.by_name[name].detach().cpu()
            if differing(self.original, name, now):
                region = self._region(name)
                if self.replayable(name, region):
                    found[name] = self.replay(name, region, now.dtype, tensor_digest(now))
                    continue
                wide = now.to(torch.float64 if now.dtype == torch.float64 else torch.float32, copy=True)
                below = self.stack.ledgers.get(name)
                if below is not None:
                    base = self.original[name].clone()
                    for touched, numbers in below.originals():
                        touched.write_(base, numbers)
                    held, was = base.to(wide.dtype), self.original[name].to(wide.dtype)
                    wide = torch.where(held == was, wide, held + (wide - was))
                found[name] = Slice(region, wide)
        return found

    def held(self) -> dict[str, Trained]:
        """Return the parameters set free, whole."""
        return {n: Trained(self.found.by_name[n], self._region(n), value) for n, value in self.original.items()}

    def _region(self, name: str) -> Region:
        shape = tuple(self.found.by_name[name].shape)
        return everything(shape, matrix_of(self.model, name, shape))

    def _kept(self, device: str | None = "cpu") -> Mapping[str, torch.Tensor]:
        now = {n: self.found.by_name[n].detach() for n in self.names}
        if self.spill:
            return Spill(now)
        return {n: (p if device is None else p.to(device)).clone() for n, p in now.items()}

    def rest(self) -> Callable[[], None]:
        """Put the originals back for a moment."""
        if not self.attached:
            return lambda: None
        now = self._kept(None)
        self._put(self.original)
        return lambda: self._put(now)

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name in values:
            into = self.found.by_name[name].data
            if isinstance(values, Spill) and into.is_contiguous():
                values.put(name, into)
            else:
                into.copy_(values[name])

    def unmount(self) -> None:
        """Put the originals back."""
        self.ended = self.deltas()
        self._put(self.original)
