"""Writes the graft of a format that `test_releases` reads for ever after: `python tests/releases/make.py`.

Run once when a format is released; the folder it makes is never written again.
"""

from pathlib import Path

import torch
from torch import nn

from neurograft.core.grafts.delta import LowRank, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.packing import FORMAT
from neurograft.core.region import Region
from neurograft.core.untie import Untie


class Net(nn.Module):
    """A base whose numbers need no random generator: entry i of each tensor is (i mod 17 - 8) / 16."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.mix = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 400)
        self.experts = nn.Parameter(torch.empty(2, 4, 6))
        self.low = nn.Linear(6, 4, bias=False)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.fresh = nn.Linear(6, 2)
        for parameter in self.parameters():
            parameter.data = (torch.arange(parameter.numel()) % 17 - 8).view(parameter.shape).float() / 16


def values(region):
    return Slice(region, torch.arange(region.numel).view(region.values_shape) / 8 - 1)


def graft(model):
    """Every kind of change and layout, an operation, ids of all widths, at half strength where that is possible."""
    apart = Untie.of(model, ["head.weight"]).mount(model)
    made = Graft.made(
        model,
        {
            "embed.weight": values(Region.of((10, 6), "rows", [1, 9])),
            "experts": values(Region.of((2, 4, 6), "cols", [0, 7])),
            "fresh.bias": New(torch.tensor([0.5, -0.5])),
            "fresh.weight": New(torch.full((2, 6), 0.25)),
            "head.weight": values(Region.of((10, 6), "flat", [3, 59])),
            "low.weight": LowRank((4, 6), torch.eye(2, 6), torch.ones(4, 2), 0.5),
            "mix.bias": values(Region.of((6,), "all")),
            "mix.weight": values(Region.of((6, 6), "block", [0, 8], block=(2, 2))),
            "wide.weight": values(Region.of((400, 6), "flat", [0, 1, 300, 2399])),
        },
        card={"note": f"format {FORMAT}"},
    )
    apart.remove()
    return made


if __name__ == "__main__":
    folder = Path(__file__).parent / f"format{FORMAT}"
    assert not folder.exists(), "a released format is never written again"
    graft(Net()).save(folder)
