"""Firing rates by group, inside of experts and out."""

import torch
from torch import nn

from neurograft.core.taps.rates import rates
from neurograft.core.units import Site, Tap
from neurograft.worlds.pico import pico, pico_batch


def test_the_bar_for_often_is_inclusive():
    net, site = nn.Sequential(nn.Identity()), {"a": Site("a", "neuron", 2, tap=Tap("0"))}
    found = rates(net, site, {"x": [{"input": torch.tensor([[1.0, -1.0], [2.0, 3.0]])}]})
    assert found.often(site, 0.5)["x"].ids["a"].tolist() == [0, 1]
    assert found.often(site, 0.51)["x"].ids["a"].tolist() == [0]


def test_experts_share_the_tokens_of_a_group():
    model, tokens = pico("mixtral"), [pico_batch(pico("mixtral"), seed=s) for s in range(2)]
    where = {
        f"e{e}": Site(f"e{e}", "neuron", 48, tap=Tap("model.layers.0.mlp.experts", "input", expert=e), layer=0)
        for e in range(4)
    }
    found = rates(model, where, {"x": tokens[:1], "y": tokens})
    assert found.tokens == tuple(int(sum(b["attention_mask"].sum() for b in g)) for g in (tokens[:1], tokens))
    share = torch.stack([found.share[n] for n in where])
    torch.testing.assert_close(share.sum(0), torch.full((2,), 2.0, dtype=torch.float64))  # each token goes to two
    for name, rate in found.rate.items():
        assert bool((rate <= found.share[name][:, None]).all())
        assert float(found.within()[name].max()) <= 1.0
