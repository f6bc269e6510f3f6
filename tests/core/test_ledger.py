"""Originals: each touched entry's once, with the oldest graft on it."""

import random

import torch

from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.ledger import Ledger
from neurograft.core.region import Region
from neurograft.core.seeds import generator


def test_every_original_is_kept_once_by_the_oldest():
    turns, rng, weight, ledger = random.Random(0), generator(0, "ledger"), torch.arange(120.0).view(12, 10), Ledger()
    base, on = weight.clone(), []
    for turn in range(60):
        if on and turns.random() < 0.45:
            name = on.pop(turns.randrange(len(on)))
            ledger, (region, original) = ledger.left(name, weight)
        else:
            layout = turns.choice(["rows", "rows", "cols", "flat"])
            total = Region.of((12, 10), layout).total
            region = Region.of((12, 10), layout, torch.randperm(total, generator=rng)[: total // 3])
            on.append(f"graft {turn}")
            change = Slice(region, torch.randn(region.values_shape, generator=rng))
            ledger, (region, original) = ledger.entered(on[-1], [(change, 1.0)], weight)
        assert torch.equal(original, region.read(base))
        region.write_(weight, ledger.rounded(region, original))
        seen: set[int] = set()
        for name in on:  # the oldest first
            member, mine = ledger.members[name], set()
            for region, numbers in member.held:
                assert torch.equal(numbers, region.read(base))
                assert not mine & set(region.flat().tolist())
                mine |= set(region.flat().tolist())
            assert mine == set(member.region.flat().tolist()) - seen
            seen |= mine
