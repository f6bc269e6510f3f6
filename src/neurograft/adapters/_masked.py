"""Live weights whose numbers follow a mask between two ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.adapters._in_place import InPlaceMount
from neurograft.adapters._plain import need_plain
from neurograft.core.compact.live import Live, Plain
from neurograft.core.compact.mask import Mask
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.delta import Shut, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.core.seeds import generator
from neurograft.core.units import Parameters


class Masked(Live):
    """A live weight whose theta are the trained numbers s of a mask.

    Args:
        name, weight, region, allow_dense: as for `Live`.
        mask: how m depends on s.
        tuned: the other end, shaped like the region's values, or None for a mask between 0 and the base.
        patch: bool, like the values: where m begins at 1; None for nowhere.
        rng: draws the start.
    """

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        region: Region,
        *,
        mask: Mask,
        tuned: Tensor | None,
        patch: Tensor | None,
        rng: torch.Generator,
        allow_dense: bool = False,
    ) -> None:
        super().__init__(name, weight, region, allow_dense=allow_dense)
        self.mask, self.tuned, self.patch = mask, tuned, patch
        self.theta = nn.Parameter(mask.start(self.theta.data, rng))

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the numbers at m = 0 and at m = 1, in theta's dtype."""
        base = self.original.to(self.theta.dtype)
        return (torch.zeros_like(base), base) if self.tuned is None else (base, self.tuned.to(self.theta.dtype))

    def numbers(self) -> Tensor:
        """Return off + m * (on - off), exact at both ends."""
        return torch.lerp(*self.ends(), self.mask.soft(self.theta.detach(), self.patch))

    def source(self) -> Tensor:
        """Return what stands for the numbers in the graph; it holds one number whatever the shape."""
        found: Tensor = _Pulled.apply(self.theta, self)
        return found

    def chosen(self) -> Tensor:
        """Return m rounded, bool."""
        return self.mask.hard(self.theta.detach(), self.patch)

    def write(self) -> None:
        """Bring the weight up to date with the mask."""
        self.mask.hold_(self.theta.data)
        super().write()

    def reload(self) -> None:
        """Refuse numbers that somebody else wrote into the weight: a mask has none of its own.

        Raises:
            RunError: they are not what the mask makes of the weight now.
        """
        with Plain():
            now = self.region.read(self.weight)
        if not torch.equal(now, self.numbers().to(now.dtype)):
            raise RunError(
                f"other numbers were written into {self.name} while a mask is trained on it; detach first, or load the "
                "mask's own state"
            )
        self.seen = self.weight._version

    def moved(self, device: torch.device) -> None:
        """Follow the weight to another device."""
        super().moved(device)
        self.tuned, self.patch = (None if t is None else t.to(device) for t in (self.tuned, self.patch))


class _Pulled(torch.autograd.Function):
    """Turns the gradient of a masked weight's numbers into that of what is trained."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, live: Masked) -> Tensor:
        ctx.live = live
        return theta.new_zeros(()).expand(theta.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        live: Masked = ctx.live
        off, on = live.ends()
        return live.mask.pulled(live.theta, grads[0] * (on - off), live.patch), None


class MaskMount(InPlaceMount):
    """Masks on a model's weights.

    Args:
        model, regions, new, allow_dense: as for any mount in place.
        mask: how m depends on what is trained.
        toward: the tuned end, a graft or a model; None for a mask over the base.
        patch: share of the numbers whose m begins at 1.
        seed: names the start.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, Region],
        *,
        new: Iterable[str] | Mapping[str, int] = (),
        allow_dense: bool = False,
        mask: Mask,
        toward: Graft | nn.Module | None,
        patch: float,
        seed: int,
    ) -> None:
        need_plain(model, regions, what="a mask over", instead="remove them")
        self.mask, self.seed = mask, seed
        self.tuned = {} if toward is None else _tuned(model, regions, toward)
        count = max(1, int(patch * sum(r.numel for r in regions.values()) + 0.5)) if patch else 0
        regions = regions if toward is None else {n: r for n, r in regions.items() if n in self.tuned}
        self.patches = _patches(model, regions, self.tuned, count) if count else {}
        super().__init__(model, regions, new=new, allow_dense=allow_dense)
        self.write()  # a mask may begin elsewhere than at the base

    def _live(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        return Masked(
            name,
            weight,
            region,
            mask=self.mask,
            tuned=self.tuned.get(name),
            patch=self.patches.get(name),
            rng=generator(self.seed, "mask", name),
            allow_dense=self.allow_dense,
        )

    def deltas(self) -> dict[str, Slice]:
        """Return what the rounded masks make of the base: entries shut, or entries gone over to the tuned model."""
        found: dict[str, Slice] = {}
        for live in self.lives:
            assert isinstance(live, Masked)
            off, on = live.ends()
            chosen = live.chosen() if live.tuned is not None else ~live.chosen()
            changed = (chosen & (off != on)).reshape(-1).cpu()
            entries, order = live.region.flat().cpu()[changed].sort()
            if not len(entries):
                continue
            region = Region.of(live.region.shape, "flat", entries, matrix=live.region.matrix)
            values = on.detach().reshape(-1).cpu()[changed][order]
            found[live.name] = Shut(region) if live.tuned is None else Slice(region, values)
        return found


def _tuned(model: nn.Module, regions: Mapping[str, Region], toward: Graft | nn.Module) -> dict[str, Tensor]:
    """Return the tuned numbers of every region in which some differ, on the device of its weight."""
    here = Parameters.of(model)

    def read(names: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        for name, region in regions.items():
            if name not in names or tuple(names[name].shape) != region.shape:
                raise RequestError(
                    f"a tuned model without a {name} of shape {region.shape}",
                    expected="a tuned version of this model",
                    do="give one of the same architecture",
                )
        return {n: r.read(names[n]).to(here.by_name[n].device) for n, r in regions.items()}

    # All regions are held once here, also those that turn out equal: a graft has to come off before they are compared.
    before = {n: r.read(here.by_name[n]) for n, r in regions.items()}
    if isinstance(toward, Graft):
        with toward.on(model):
            found = read(here.by_name)
    else:
        found = read(Parameters.of(toward).by_name)
    found = {n: v for n, v in found.items() if not torch.equal(v, before[n].to(v.device, v.dtype))}
    if not found:
        raise RequestError(
            f"a tuned model that differs nowhere in the {len(regions)} selected parameters",
            expected="a change under the mask",
            do="select the units that were tuned",
        )
    return found


def _patches(
    model: nn.Module, regions: Mapping[str, Region], tuned: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Return where the numbers are that differ most, taken over all parameters at once; ties to the first."""
    weights = Parameters.of(model).by_name
    moves = {n: (tuned[n].float() - r.read(weights[n]).float()).abs().reshape(-1) for n, r in regions.items()}
    joined = torch.cat([m.cpu() for m in moves.values()])
    chosen = torch.zeros(len(joined), dtype=torch.bool)
    chosen[joined.sort(descending=True, stable=True).indices[:count]] = True
    parts = chosen.split([len(m) for m in moves.values()])
    return {n: p.view(tuned[n].shape).to(tuned[n].device) for n, p in zip(moves, parts)}
