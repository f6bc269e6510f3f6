"""LoRA inside the chosen rows: their change is a product of two small matrices, everything else stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from neurograft.adapters._in_place import InPlaceMount
from neurograft.adapters._plain import need_plain
from neurograft.core.card import method
from neurograft.core.compact.factored import Factored
from neurograft.core.compact.live import Live
from neurograft.core.compact.mount import Mount, regions_of
from neurograft.core.context import Trained
from neurograft.core.errors import RequestError
from neurograft.core.grafts.coordinates import everything
from neurograft.core.grafts.delta import Delta, LowRank, Slice
from neurograft.core.linears import transposed
from neurograft.core.region import Region
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.units import Parameters


@method(
    paper="loki",
    claims={"undo", "zero_graft", "resume", "coordinates"},
    departs="The scale of the product and how its factors start are LoRA's; the paper prints neither.",
)
def slice_lora(
    model: nn.Module,
    where: Selection | None,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    rank: int = 8,
    alpha: float | None = None,
    allow_dense: bool = False,
    seed: int = 0,
) -> Mount:
    """Train W_S = W0_S + (alpha / rank) A B, S the chosen rows or columns: A [|S|, rank] from 0, B drawn.

    Single numbers that the units own beside them, such as biases, are trained as they are. The graft holds the factors
    in the full shape, zero outside of S, so that it exports as a LoRA of that rank.

    Args:
        model: any module.
        where: units that own whole rows or whole columns.
        new: parameters the base's checkpoint lacks, trained whole.
        protect: units whose numbers must not move.
        rank: of the product, in each weight at most |S| and as many as its rows are long, beyond which a rank adds
            nothing.
        alpha: 2 rank if None.
        allow_dense: accept a dense gradient where an operation on a selected weight is not known.
        seed: names the numbers of B.

    Raises:
        RequestError: no units, units that own no whole rows or columns, or a base with grafts on it.
    """
    if where is None or rank < 1:
        raise RequestError(
            f"slice_lora with where={where} and rank={rank}",
            expected="a selection and a positive rank",
            do="select rows, or use adapter='lora' for whole matrices",
        )
    regions = regions_of(model, where, protect=protect)
    need_plain(model, regions, what="slice_lora on", instead="use adapter='slice'")
    found = Parameters.of(model)
    for name, region in regions.items():
        if found.by_name[name].dim() == 1:
            continue
        if len(region.values_shape) != 2:
            raise RequestError(
                f"a selection of {name} by {region.layout}",
                expected="whole rows or columns of a matrix",
                do="use adapter='slice'",
            )
    scale = (2.0 * rank if alpha is None else alpha) / rank
    return FactoredMount(model, regions, new=new, rank=rank, scale=scale, allow_dense=allow_dense, seed=seed)


class FactoredMount(InPlaceMount):
    """Factors trained in place; the chosen rows become base + scale * A B."""

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, Region],
        *,
        rank: int,
        scale: float,
        seed: int,
        new: Iterable[str] | Mapping[str, int] = (),
        allow_dense: bool = False,
    ) -> None:
        self.rank, self.scale, self.seed = rank, scale, seed
        super().__init__(model, regions, new=new, allow_dense=allow_dense)

    def _live(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        if weight.dim() == 1:
            return super()._live(name, weight, region)
        rng = generator(self.seed, "slice_lora", name)
        return Factored(
            name,
            weight,
            region,
            rank=min(self.rank, *region.values_shape),
            scale=self.scale,
            rng=rng,
            allow_dense=self.allow_dense,
        )

    def deltas(self) -> dict[str, Slice] | dict[str, Delta]:  # type: ignore[override]
        """Return the factors, zero outside of the chosen rows; folded rows where a checkpoint cuts the weight."""
        found: dict[str, Delta] = {}
        for live in self.lives:
            if not isinstance(live, Factored):
                found[live.name] = Slice(live.region.to("cpu"), live.theta.detach().cpu().clone())
                continue
            flipped = transposed(self.model.get_submodule(live.name.rpartition(".")[0]))
            whole = everything(live.region.shape, live.region.matrix)
            if len(live.region.shape) == 2 and len(self.where.to_checkpoint(live.name, whole)) == 1:
                found[live.name] = _wide(live, flipped)
            else:
                found[live.name] = Slice(live.region.to("cpu"), live.numbers().cpu().clone())
        return found

    def held(self) -> dict[str, Trained]:
        """Return nothing: the change is of another shape."""
        return {}


def _wide(live: Factored, flipped: bool) -> LowRank:
    """Return the factors of a whole matrix, A B in its chosen rows or columns and 0 elsewhere."""
    a, b = (f.detach().cpu().float().clone() for f in live.factors())
    ids = live.region.ids.cpu()
    by_rows = live.region.layout != "cols"
    if live.region.layout == "all":
        ids = torch.arange(len(a))
    chosen = torch.zeros(live.region.shape[0 if by_rows else 1], a.shape[1])
    chosen[ids] = a
    if by_rows != flipped:  # the chosen axis is the output's
        return LowRank(live.region.shape, b, chosen, live.scale, flipped)
    return LowRank(live.region.shape, chosen.t().contiguous(), b.t().contiguous(), live.scale, flipped)
