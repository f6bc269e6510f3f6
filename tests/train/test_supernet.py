"""Steps of a supernet's training and of a path's fine-tuning, by hand."""

import pytest
import torch

from neurograft.core.seeds import generator
from neurograft.train.adaptable import units_of
from neurograft.train.supernet import Episode, Supernet
from neurograft.worlds.pico import pico, pico_batch


def _episode(model, seed=0):
    def x(n, seed):
        return {"pixel_values": pico_batch(model, batch=n, seed=seed)["pixel_values"]}

    return Episode(x(4, seed), torch.tensor([0, 1, 0, 1]), x(2, seed + 1), torch.tensor([0, 1]))


def test_every_step_of_a_path_takes_the_gradient_of_its_own_loss():
    """SGD by hand: of the support alone, from the supernet's values, which stay."""
    model = pico("vit").eval()
    net, episode = Supernet(model, units_of(model)), _episode(model)
    path = torch.tensor([0.0, 1.0, 0.0, 0.0])
    own = {n: net.own[n].detach().clone() for n in net.awake(path)}
    for _ in range(3):
        now = {n: v.clone().requires_grad_(True) for n, v in own.items()}
        loss = net.loss(path, episode, now, on_support=True)
        grads = torch.autograd.grad(loss, list(now.values()))
        own = {n: v - 0.1 * g for (n, v), g in zip(own.items(), grads)}
    found, _ = net.tuned(path, episode, steps=3, optimizer="SGD", lr=0.1, decay=0.0)
    assert found.keys() == own.keys()
    for name, value in own.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    decayed, _ = net.tuned(path, episode, steps=1, optimizer="SGD", lr=0.1, decay=0.5)
    plain, _ = net.tuned(path, episode, steps=1, optimizer="SGD", lr=0.1, decay=0.0)
    for name in own:
        torch.testing.assert_close(decayed[name], plain[name] - 0.05 * net.own[name], rtol=0, atol=1e-6)


def test_each_episode_of_the_supernet_is_one_step_of_its_query_loss_on_a_drawn_path():
    model = pico("vit").eval()
    net, twin = (Supernet(model, units_of(model), seed=5) for _ in range(2))
    episodes = [_episode(model, s) for s in (0, 3, 6)]
    losses = net.train(episodes, optimizer="SGD", lr=0.1, decay=0.0)
    rng = generator(5, "supernet")
    for episode, seen in zip(episodes, losses, strict=True):
        path = torch.randint(2, (4,), generator=rng).double()
        loss = twin.loss(path, episode, twin.own)
        assert float(loss.detach()) == pytest.approx(seen, abs=1e-5)
        used = [twin.own[n] for n in twin.awake(path)]
        for p, g in zip(used, torch.autograd.grad(loss, used, allow_unused=True)):
            p.data -= 0.0 if g is None else 0.1 * g
    for name, value in twin.own.items():
        torch.testing.assert_close(net.own[name].detach(), value.detach(), rtol=0, atol=1e-6)
