"""The residual stream behind a module."""

import torch
from torch import nn

from neurograft.core.taps.behind import Behind


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
