"""What neurons write along a direction in two models: exact shares of a change, neuron by neuron.

Shape letters: n neurons of a site, d residual channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError
from neurograft.core.kinds import LOWERING, RAISING
from neurograft.core.prompts.passing import Positions
from neurograft.core.selection import Selection
from neurograft.core.taps.stream import means
from neurograft.core.taps.watching import routed
from neurograft.core.units import Parameters, Site


@dataclass(frozen=True)
class Projection:
    """Mean activations, and what they write along a unit direction, before and after a change.

    Args:
        sites: neurons tapped where they enter the down projection.
        before: site name -> mean activation, float64 [n].
        after: the same under the change.
        along: site name -> v_i . w / ||w|| before, v_i what neuron i writes, float64 [n].
        along_after: the same under the change.
    """

    sites: Mapping[str, Site]
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    along: Mapping[str, Tensor]
    along_after: Mapping[str, Tensor]

    def drop(self) -> dict[str, Tensor]:
        """Return dP_i = P_i before - P_i after, P_i = mean a_i * (v_i . w / ||w||), float64 [n] for each site."""
        return {n: self.before[n] * self.along[n] - self.after[n] * self.along_after[n] for n in self.sites}

    def groups(self) -> dict[str, Selection]:
        """Return the eight groups by name; together they hold every neuron once.

        T neurons write along the direction (v . w > 0 before), A neurons do not; P have a mean activation >= 0 before,
        N below. Those of `LOWERING` moved so that less is written along it: TP-, TN-down (the paper's TN+), AP+ and
        AN-up (its AN-); those of `RAISING` did not move so.
        """
        ids: dict[str, dict[str, Tensor]] = {group: {} for group in (*LOWERING, *RAISING)}
        for name in self.sites:
            toward, active = self.along[name] > 0, self.before[name] >= 0
            fell, rose = self.after[name] < self.before[name], self.after[name] > self.before[name]
            kinds = (toward & active, toward & ~active, ~toward & active, ~toward & ~active)
            for lower, higher, kind, moved in zip(LOWERING, RAISING, kinds, (fell, fell, rose, rose)):
                ids[lower][name] = (kind & moved).nonzero()[:, 0]
                ids[higher][name] = (kind & ~moved).nonzero()[:, 0]
        return {g: Selection.of(self.sites, mine, {"rule": "projection", "group": g}) for g, mine in ids.items()}


def projected(
    base: nn.Module,
    changed: AbstractContextManager[nn.Module],
    sites: Mapping[str, Site],
    batches: Sequence[Batch],
    direction: Tensor,
    *,
    positions: Positions = "all",
) -> Projection:
    """Measure neurons along a direction in a base and, inside of a context manager that gives it, a changed model.

    What a neuron writes is read in the model whose activation it meets.

    Args:
        base: run as it is.
        changed: gives the changed model for the length of a `with` block.
        sites: neurons at "act".
        batches: the same for both.
        direction: float [d], of any length but 0.
        positions: which tokens count.

    Raises:
        RequestError: another kind of unit, or a direction of another width or of length 0.
    """
    for site in sites.values():
        if site.kind != "neuron" or len(site.writes) != 1 or site.at not in ("", "act") or routed(site):
            raise RequestError(
                f"{site.name!r} ({site.kind}{', inside of an expert' if routed(site) else ''})",
                expected="neurons at 'act' that see every token",
                do="use units='neuron' of a dense model",
            )
    if direction.dim() != 1 or not float(direction.norm()) > 0:
        raise RequestError(
            f"a direction of shape {tuple(direction.shape)} and length {float(direction.norm()):g}",
            expected="[d], with a length",
            do="fit a probe on examples that differ",
        )
    w = direction.detach().double().cpu()
    before, along = _read(base, sites, batches, w / w.norm(), positions)
    with changed as other:
        after, along_after = _read(other, sites, batches, w / w.norm(), positions)
    return Projection(dict(sites), before, after, along, along_after)


def _read(
    model: nn.Module, sites: Mapping[str, Site], batches: Sequence[Batch], w: Tensor, positions: Positions
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    known, along = Parameters.of(model), {}
    for name, site in sites.items():
        part = site.parts[site.writes[0]]
        vectors = part.read(known.by_name[known.alias[part.param]]).double().cpu()
        if vectors.shape[1] != len(w):
            raise RequestError(
                f"a direction of {len(w)} numbers for {name!r}, whose neurons write {vectors.shape[1]}",
                expected="one number for each residual channel",
                do="take the direction from this model's residual stream",
            )
        along[name] = vectors @ w
    found = means(model, sites, batches, mask=positions)
    return {name: found[name].double() for name in sites}, along
