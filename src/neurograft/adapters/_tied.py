"""Tied deltas: one shared update vector for all chosen units of a site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from neurograft.adapters._in_place import InPlaceMount
from neurograft.adapters._plain import need_plain
from neurograft.core.compact.live import Live
from neurograft.core.compact.mount import matrix_of
from neurograft.core.compact.tied import Tied, TiedBeside
from neurograft.core.errors import RequestError
from neurograft.core.grafts.coordinates import everything
from neurograft.core.grafts.delta import Delta, LowRank, Slice
from neurograft.core.linears import transposed
from neurograft.core.region import Region, region_of
from neurograft.core.selection import Selection
from neurograft.core.units import Parameters, Part


class TiedMount(InPlaceMount):
    """Vectors trained in place, or beside the weight; row i of a group becomes base_i + vector of the group."""

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, Region],
        where: Selection,
        *,
        new: Iterable[str] | Mapping[str, int] = (),
        allow_dense: bool = False,
        beside: bool = False,
    ) -> None:
        self.kind = TiedBeside if beside else Tied
        need_plain(model, regions, what="tie='site' on", instead="leave tie out")
        self.grouped = grouped(model, regions, where)
        super().__init__(model, {n: r for n, (r, _) in self.grouped.items()}, new=new, allow_dense=allow_dense)

    def _live(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        return self.kind(name, weight, region, self.grouped[name][1], allow_dense=self.allow_dense)

    def deltas(self) -> dict[str, Slice] | dict[str, Delta]:  # type: ignore[override]
        """Return vectors and 0/1 membership as low-rank factors, exactly; folded rows where a weight has no factors."""
        found: dict[str, Delta] = {}
        for live in self.lives:
            assert isinstance(live, Tied)
            owner = self.model.get_submodule(live.name.rpartition(".")[0])
            flipped = transposed(owner)
            shape, matrix = live.region.shape, live.region.matrix
            whole = self.where.to_checkpoint(live.name, everything(shape, matrix)) if len(shape) == 2 else []
            if live.region.layout == ("cols" if flipped else "rows") and len(whole) == 1:
                member = torch.zeros(shape[1 if flipped else 0], len(live.theta))
                member[live.region.ids.cpu(), live.groups.cpu()] = 1.0
                vectors = live.theta.detach().cpu().float().clone()
                found[live.name] = LowRank(shape, vectors, member, 1.0, flipped)
            else:
                found[live.name] = Slice(live.region.to("cpu"), live.numbers().cpu().clone())
        return found


def grouped(model: nn.Module, regions: Mapping[str, Region], where: Selection) -> dict[str, tuple[Region, Tensor]]:
    """Return for each parameter its region, by rows, columns or single entries, and the group of each of them.

    Raises:
        RequestError: units of several shapes meet in a parameter, or a unit stands in two sites.
    """
    found = Parameters.of(model)
    gathered: dict[str, list[tuple[str, tuple[Region, Tensor]]]] = {}
    for name, ids in where.ids.items():
        for index, part in enumerate(where.sites[name].parts if len(ids) else ()):
            key = found.alias[part.param]
            gathered.setdefault(key, []).append((f"{name}/{index}", _pieces(model, part, ids)))
    made = {}
    for key, region in regions.items():
        pieces = gathered[key]
        layouts = {piece.layout for _, (piece, _) in pieces}
        if len(layouts) > 1 or not layouts <= {"rows", "cols", "flat"}:
            raise RequestError(
                f"tie='site' for units that lie as {' and '.join(sorted(layouts))} in {key}",
                expected="whole rows, whole columns or single entries",
                do="tie neurons or heads by one kind of their numbers: selector ('only', {'parts': 'reads'})",
            )
        ids = torch.cat([piece.ids for _, (piece, _) in pieces])
        labels = torch.cat([place + 1_000_003 * g for g, (_, (_, place)) in enumerate(pieces)])
        if len(ids.unique()) != len(ids):
            raise RequestError(
                f"tie='site' with a unit of {key} in two sites",
                expected="each unit in one group",
                do="cluster a selection once, and draw controls with their groups apart",
            )
        layout = layouts.pop()
        if region.layout == layout:  # protected units are out
            kept = torch.isin(ids, region.ids.cpu())
            ids, labels = ids[kept], labels[kept]
        order = ids.argsort()
        groups = labels[order].unique(return_inverse=True)[1]
        made[key] = (Region.of(region.shape, layout, ids[order], matrix=region.matrix), groups)
    return made


def _pieces(model: nn.Module, part: Part, ids: Tensor) -> tuple[Region, Tensor]:
    """Return the region of some units, and for each of its rows the place inside its unit."""
    shape = tuple(Parameters.of(model).by_name[Parameters.of(model).alias[part.param]].shape)
    matrix = matrix_of(model, part.param, shape)
    one = region_of(part, ids[:1], shape, matrix)
    width = len(one.ids)
    every = [region_of(part, ids[i : i + 1], shape, matrix).ids for i in range(len(ids))]
    return Region.of(shape, one.layout, torch.cat(every), matrix=matrix), torch.arange(width).repeat(len(ids))
