"""Channels: a small dense map among the chosen channels of the residual stream, behind a sub-layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from neurograft.adapters._operations import Held, OperationMount
from neurograft.anatomy.entering import entering, stream_of, with_streams
from neurograft.anatomy.roles import with_roles
from neurograft.anatomy.sites import sites
from neurograft.core.card import method
from neurograft.core.channel_map import ChannelMap, mapped
from neurograft.core.compact.mount import Mount
from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.taps.behind import Behind
from neurograft.core.units import Site

STARTS = ("zero", "normal")


@method(
    paper="sct",
    claims={"undo", "zero_graft", "resume"},
    departs="Starts at zero, so that nothing changes before the first step; start='normal' draws W as the reference "
    "does (truncated normal, 0.02).",
)
def channels(
    model: nn.Module,
    where: Selection | None = None,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    start: str = "zero",
    seed: int = 0,
) -> Mount:
    """Train x[..., S] += x[..., S] W^T + b for the chosen channels S of each site; k * k + k numbers for k channels.

    No weight of the model moves: the graft holds W and b of each site, and what is protected stays as it is anyway.

    Args:
        model: any module with residual channels.
        where: units of kind "channel": as attention writes them (the stream behind attention), or `at="residual"` (the
            stream behind the block); None for all channels behind each attention.
        new: parameters the base's checkpoint lacks, trained whole.
        protect: units whose numbers must not move.
        start: W at the start: "zero", or "normal".
        seed: names the numbers of "normal".

    Raises:
        RequestError: units of another kind, or of a sub-layer whose stream is not known; an unknown start.
    """
    one_of(start, STARTS, what="start")
    known = entering(model)
    if where is None:
        found = with_streams(model, with_roles(model, sites(model, "channel"), "attention"))
        where = Selection.of(found, {n: range(s.n) for n, s in found.items()})
    chosen = [(where.sites[n], ids) for n, ids in where.ids.items() if len(ids)]
    odd = [s for s, _ in chosen if s.kind != "channel" or not (s.at == "residual" or stream_of(known, s))]
    if odd or not chosen:
        raise RequestError(
            f"units of {odd[0].name!r} for adapter='channels'" if odd else "a selection of no channel",
            expected="residual channels as a block's first sub-layer writes them, added as they are, or at='residual'",
            do="locate(units='channel', by=('within', {'by': 'salient', 'roles': 'attention', 'streams': True})), or "
            "at='residual'",
        )

    def place() -> Iterator[LiveMap]:
        return (LiveMap(model, s, stream_of(known, s), ids, start=start, seed=seed) for s, ids in chosen)

    return OperationMount(model, place, new=new)


class LiveMap:
    """A map under training.

    Args:
        model: the model.
        site: its channels.
        block: see `ChannelMap`.
        ids: the chosen ones.
        start: see `channels`.
        seed: the same.
    """

    def __init__(self, model: nn.Module, site: Site, block: str | None, ids: Tensor, *, start: str, seed: int) -> None:
        k, owner = len(ids), site.parts[0].param
        assert site.tap is not None
        weight = torch.zeros(k, k)
        if start == "normal":
            rng = generator(seed, "channels", site.name)
            nn.init.trunc_normal_(weight, std=0.02, generator=rng)
        self.site, self.block, self.ids, self.resting = site, block, ids, False
        self.weight = Held(f"{site.tap.module}.channels_map", weight)
        self.bias = Held(f"{site.tap.module}.channels_bias", torch.zeros(k))
        self.names = (f"{owner}.map", f"{owner}.shift")
        device = model.get_parameter(owner).device
        for held in (self.weight, self.bias):
            held.moved(device)
        self.seat = Behind(model, site.tap.module, block, self._visit, dim=site.tap.dim)

    def _visit(self, stream: Tensor) -> Tensor | None:
        return None if self.resting else mapped(stream, self.ids, self.weight.theta, self.bias.theta)

    def held(self) -> dict[str, Held]:
        """Return W and b."""
        return dict(zip(self.names, (self.weight, self.bias)))

    def operation(self) -> ChannelMap:
        """Return the map as it is now."""
        weight, bias = (h.theta.detach().cpu().clone() for h in (self.weight, self.bias))
        return ChannelMap(self.site, self.block, self.ids, weight, bias)

    def remove(self) -> None:
        """Take it off."""
        self.seat.remove()
