"""How often units fire, by group of data: what entropy over groups, thresholds within one and their changes read.

Shape letters: K groups, n units of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch, token_mask
from neurograft.core.errors import RequestError
from neurograft.core.prompts.passing import Positions
from neurograft.core.selection import Selection
from neurograft.core.taps.reducers import Rate
from neurograft.core.taps.stream import observe
from neurograft.core.taps.watching import routed
from neurograft.core.units import Site


@dataclass(frozen=True)
class Rates:
    """How often units fire in each group.

    Args:
        groups: their names.
        rate: site name -> share of the group's tokens at which a unit is above the bar, float64 [K, n]. A neuron of
            an expert that does not see a token does not fire there, so it never exceeds `share`.
        share: site name -> share of the group's tokens that reach the site, float64 [K]: 1 outside of experts.
        tokens: counted tokens of each group.
    """

    groups: tuple[str, ...]
    rate: Mapping[str, Tensor]
    share: Mapping[str, Tensor]
    tokens: tuple[int, ...]

    def within(self) -> dict[str, Tensor]:
        """Return rates over the tokens that reach a site, rate / share, float64 [K, n]; 0 where none does."""
        return {name: rate / self.share[name][:, None].clamp(min=1e-300) for name, rate in self.rate.items()}

    def often(self, sites: Mapping[str, Site], least: float, *, within: bool = False) -> dict[str, Selection]:
        """Return for each group the units that fire at `least` a share of its tokens, or of those that reach the site.

        Args:
            sites: as given to `rates`.
            least: the bar, inclusive.
            within: count over the tokens routed to an expert, not over all.
        """
        table = self.within() if within else self.rate
        card = {"rule": "often", "least": least, "within": within, "tokens": dict(zip(self.groups, self.tokens))}
        return {
            group: Selection.of(
                sites, {name: (table[name][k] >= least).nonzero()[:, 0] for name in sites}, {**card, "group": group}
            )
            for k, group in enumerate(self.groups)
        }

    def experts(self, sites: Mapping[str, Site], experts: Mapping[str, Site], least: float) -> dict[str, Selection]:
        """Return for each group the experts that at least a share of its tokens are routed to.

        Args:
            sites: neurons inside of the experts, as given to `rates`.
            experts: the experts' own sites.
            least: the bar, inclusive.

        Raises:
            RequestError: no expert holds any of the neurons.
        """
        home = {
            (part.param, int(first)): (name, e)
            for name, site in experts.items()
            for part in site.parts
            for e, first in enumerate(part.offsets(torch.arange(site.n)))
        }
        mine = {n: home.get((p.param, int(p.offsets(torch.tensor([0]))))) for n in sites for p in sites[n].parts[:1]}
        if not any(mine.values()):
            raise RequestError("neurons of no expert", expected="a mixture of experts", do="leave experts out")
        found = {}
        for k, group in enumerate(self.groups):
            ids: dict[str, list[int]] = {}
            for name, place in mine.items():
                if place is not None and float(self.share[name][k]) >= least:
                    ids.setdefault(place[0], []).append(place[1])
            found[group] = Selection.of(experts, ids, {"rule": "routed", "least": least, "group": group})
        return found


def rates(
    model: nn.Module,
    sites: Mapping[str, Site],
    groups: Mapping[str, Sequence[Batch]],
    *,
    above: float = 0.0,
    positions: Positions = "all",
) -> Rates:
    """Count at how many tokens of each group every unit is above a bar; padding never counts.

    Args:
        model: run as it is, without gradients.
        sites: what to count; each needs a tap.
        groups: name -> batches.
        above: the bar.
        positions: which tokens count.

    Raises:
        RequestError: a group without data, a site without a tap, experts and data without tokens, experts of an
            encoder-decoder.

    Example:
        >>> from neurograft.core.units import Tap
        >>> net, site = nn.Sequential(nn.Identity()), Site("a", "neuron", 2, tap=Tap("0"))
        >>> groups = {"x": [{"input": torch.tensor([[1.0, -1.0], [2.0, 3.0]])}], "y": [{"input": -torch.ones(1, 2)}]}
        >>> rates(net, {"a": site}, groups).rate["a"].tolist()
        [[1.0, 0.5], [0.0, 0.0]]
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and any(map(routed, sites.values())):
        raise RequestError(
            "experts of an encoder-decoder, whose two sides see different tokens",
            expected="experts of a decoder or an encoder",
            do="choose units outside of experts",
        )
    rate: dict[str, list[Tensor]] = {name: [] for name in sites}
    share: dict[str, list[float]] = {name: [] for name in sites}
    tokens = []
    for group, batches in groups.items():
        found = observe(model, sites, batches, lambda n: {"": Rate(n, above=above)}, mask=positions)
        seen = {name: reducers[""] for name, reducers in found.items()}
        whole = _tokens(batches, positions)
        if whole is None:
            whole = max(r.count for r in seen.values())
            if any(routed(site) for site in sites.values()):
                raise RequestError(
                    f"experts and data without tokens in the group {group!r}",
                    expected="data whose tokens can be counted",
                    do="choose units outside of experts",
                )
        tokens.append(whole)
        for name, counted in seen.items():
            assert isinstance(counted, Rate)
            total = whole if routed(sites[name]) else counted.count
            rate[name].append(counted.fired / max(1, total))
            share[name].append(counted.count / max(1, total))
    return Rates(
        tuple(groups),
        {name: torch.stack(rows) for name, rows in rate.items()},
        {name: torch.tensor(rows, dtype=torch.float64) for name, rows in share.items()},
        tuple(tokens),
    )


def _tokens(batches: Sequence[Batch], positions: Positions) -> int | None:
    masks = [token_mask(batch, "all" if positions == "generated" else positions) for batch in batches]
    return None if any(m is None for m in masks) else sum(int(m.sum()) for m in masks if m is not None)
