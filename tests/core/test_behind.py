"""The residual stream behind a module."""

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.channel_map import ChannelMap
from neurograft.core.errors import RequestError
from neurograft.core.taps.behind import Behind
from neurograft.worlds.pico import pico


def test_the_stream_behind_a_module_is_what_entered_its_block_plus_what_it_adds():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return x + self.inner(x)

    net, x, seen = nn.Sequential(Block()), torch.ones(1, 2), []
    plain = net(x)
    seat = Behind(net, "0.inner", "0", lambda stream: seen.append(stream) or 2 * stream)
    torch.testing.assert_close(net(x), 3 * plain)
    torch.testing.assert_close(seen[0], plain)
    seat.remove()
    assert torch.equal(net(x), plain)


def test_a_map_is_of_distinct_channels_of_its_site_and_of_their_shape():
    site = next(iter(sites(pico("llama"), "channel").values()))
    last = site.n - 1
    made = ChannelMap(site, None, torch.tensor([0, last]), torch.eye(2), torch.zeros(2))
    assert made.scaled(1.0) is made
    assert torch.equal(made.scaled(0.5).weight, 0.5 * torch.eye(2))
    with pytest.raises(RequestError, match="as a weight change"):
        made.fold(nn.Identity())
    two, cases = (torch.eye(2), torch.zeros(2)), [([0, last + 1], torch.eye(2), torch.zeros(2))]
    cases += [([0, 0], *two), ([-1, 0], *two), ([0, 1], torch.eye(3), two[1]), ([0, 1], two[0], torch.zeros(3))]
    cases += [([], torch.zeros(0, 0), torch.zeros(0))]
    for ids, weight, bias in cases:
        with pytest.raises(RequestError, match=f"distinct residual channels of 0 to {last}"):
            ChannelMap(site, None, torch.tensor(ids, dtype=torch.int64), weight, bias)
