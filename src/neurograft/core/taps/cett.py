"""CETT: how much of what an FFN writes at a token one of its neurons writes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.taps.table import Each
from neurograft.core.units import Parameters, Site

EPS = 1e-8


def shares(model: nn.Module, sites: Mapping[str, Site]) -> Each:
    """Return (site name, activations [tokens, n]) -> |a_j| * ||w_j|| / (||sum_j a_j w_j|| + 1e-8), w_j what j writes.

    The shares of a token sum to at least 1, to exactly 1 where all neurons write in one direction.

    Args:
        model: its weights are read when an activation comes.
        sites: neurons tapped where they enter the down projection.

    Raises:
        RequestError: units that do not write one vector each.
    """
    found, written = Parameters.of(model), {}
    for name, site in sites.items():
        if site.kind != "neuron" or len(site.writes) != 1 or site.at not in ("", "act"):
            raise RequestError(
                f"the shares of {name!r} ({site.kind}, at={site.at!r}) in an FFN's output",
                expected="neurons at 'act', which write one vector each",
                do="use units='neuron' without at=, or statistic='activation'",
            )
        part = site.parts[site.writes[0]]
        written[name] = (part, found.by_name[found.alias[part.param]])

    def each(name: str, x: Tensor) -> Tensor:
        part, weight = written[name]
        vectors = part.read(weight).float()
        whole = torch.linalg.vector_norm(x.float() @ vectors, dim=-1, keepdim=True)
        return x.float().abs() * torch.linalg.vector_norm(vectors, dim=1) / (whole + EPS)

    return each
