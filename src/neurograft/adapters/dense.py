"""Whole parameters trained themselves: full fine-tuning, or of some modules or layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from neurograft.core.card import method
from neurograft.core.context import Trained
from neurograft.core.delta import Slice
from neurograft.core.errors import RequestError
from neurograft.core.mount import Mount, matrix_of, regions_of
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
) -> Mount:
    """Train whole parameters as they are; their originals are kept once, off the device.

    Args:
        model: any module.
        where: units that own whole parameters (modules, layers, all rows of a weight); None for everything.
        new: parameters the base's checkpoint lacks.
        protect: units whose parameters stay frozen, whole.
        tied: "both", as full fine-tuning does, or "refuse".

    Raises:
        RequestError: a selection holds only a part of a parameter.
    """
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
    mount = DenseMount(model, names, new=new)
    mount.declared = where is not None
    return mount


class DenseMount(Mount):
    """Parameters set free, and their originals."""

    def __init__(self, model: nn.Module, names: list[str], *, new: Iterable[str] | Mapping[str, int] = ()) -> None:
        super().__init__(model, new=new)
        self.names = [n for n in names if n not in self.new]
        self.original = {n: self.found.by_name[n].detach().cpu().clone() for n in self.names}
        for name in self.names:
            self.found.by_name[name].requires_grad_(True)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters set free."""
        return {n: self.found.by_name[n] for n in self.names}

    def deltas(self) -> dict[str, Slice]:
        """Return the parameters that differ from the base, whole."""
        found = {}
        for name in self.names:
            now = self.kept[name] if not self.attached else self.found.by_name[name].detach().cpu()
            if not torch.equal(now, self.original[name]):
                wide = now.to(torch.float64 if now.dtype == torch.float64 else torch.float32, copy=True)
                below = self.stack.ledgers.get(name)
                if below is not None:
                    base = self.original[name].clone()
                    below.region.write_(base, below.original)
                    held, was = base.to(wide.dtype), self.original[name].to(wide.dtype)
                    wide = torch.where(held == was, wide, held + (wide - was))
                found[name] = Slice(self._whole(name), wide)
        return found

    def held(self) -> dict[str, Trained]:
        """Return the parameters set free, whole."""
        return {n: Trained(self.found.by_name[n], self._whole(n), value) for n, value in self.original.items()}

    def _whole(self, name: str) -> Region:
        shape = tuple(self.original[name].shape)
        return Region(shape, matrix_of(self.model, name, shape), "all", torch.empty(0, dtype=torch.int64))

    def rest(self) -> Callable[[], None]:
        """Put the originals back for a moment."""
        if not self.attached:
            return lambda: None
        now = {n: self.found.by_name[n].detach().clone() for n in self.names}
        self._put(self.original)
        return lambda: self._put(now)

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.found.by_name[name].data.copy_(value)

    def unmount(self) -> None:
        """Put the originals back."""
        self.kept = {n: self.found.by_name[n].detach().cpu().clone() for n in self.names}
        self._put(self.original)
