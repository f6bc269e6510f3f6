"""Gradients that are put off: the same numbers as whole ones, whoever looks, and no whole one where nobody does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from neurograft.core.compact import deferred, products
from neurograft.core.compact.deferred import Deferred, Product
from neurograft.core.compact.live import Live
from neurograft.core.compact.uses import tag, untag
from neurograft.core.region import Region

WIDE, FFN = 6, 10
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "composed": lambda x: x * torch.sigmoid(1.7 * x) + x,
    "broadcast": lambda x: F.silu(x) * torch.linspace(-1, 2, FFN, dtype=torch.float64),
}
WHOLE = ("composed", "broadcast")  # a sum of two gradients, a factor of another shape: no elementwise change of one


class Gated(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, act, bias):
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        sizes = {"gate": (FFN, WIDE), "up": (FFN, WIDE), "down": (WIDE, FFN)}
        for name, (rows, columns) in sizes.items():
            layer = nn.Linear(columns, rows, bias=bias, dtype=torch.float64)
            layer.weight.data = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
            setattr(self, name, layer)
        self.act = act
        self.requires_grad_(False)

    def hidden(self, x):
        return self.act(self.gate(x)) * self.up(x)

    def forward(self, x):
        return self.down(self.hidden(x))


class Plain(Gated):
    """down(act(up(x)))."""

    def hidden(self, x):
        return self.act(self.up(x))


def lives_of(net, ids):
    """Neurons `ids[name]` of each matrix."""
    found = {}
    for name, chosen in ids.items():
        weight = getattr(net, name).weight
        found[name] = Live(
            f"{name}.weight", weight, Region.of(tuple(weight.shape), "cols" if name == "down" else "rows", chosen)
        )
    return found


@pytest.fixture
def counted(monkeypatch):
    """How many whole products were computed, and how many deferred gradients were made."""
    counts, plain, made = {"whole": 0, "made": 0}, Product.whole, Deferred.of

    def whole(self):
        counts["whole"] += self.found is None
        return plain(self)

    def of(*given):
        counts["made"] += 1
        return made(*given)

    monkeypatch.setattr(Product, "whole", whole)
    monkeypatch.setattr(Deferred, "of", staticmethod(of))
    return counts


X = torch.randn(2, 5, WIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IDS = {"gate": [0, 3, 9], "up": [1, 3], "down": [2, 3, 5]}


def read(net, ids, look, off, monkeypatch, x=X):
    """The gradients of the values, and what `look` found, with deferral on or off."""
    lives = lives_of(net, ids)
    for live in lives.values():
        tag(live)
    with monkeypatch.context() as patch:
        if off:
            patch.setattr(products, "pays", lambda x, tap: False)
        found = look(net, x)
    for live in lives.values():
        live.restore()
        untag(live)
    return {n: live.theta.grad for n, live in lives.items()}, found


def backward(net, x):
    net(x).square().sum().backward()
    return []


@pytest.mark.parametrize("kind", [Gated, Plain])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_gradients_are_those_of_the_whole_product(act, bias, kind, counted, monkeypatch):
    net, ids = kind(ACTIVATIONS[act], bias), {n: IDS[n] for n in (IDS if kind is Gated else ("up", "down"))}
    found, _ = read(net, ids, backward, False, monkeypatch)
    assert counted["made"] > 0
    assert counted["whole"] == (act in WHOLE)
    wanted, _ = read(net, ids, backward, True, monkeypatch)
    for name in ids:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)


def kept(net, x):
    held = []

    def keep(module, args):
        args[0].retain_grad()
        held.append(args[0])

    handle = net.down.register_forward_pre_hook(keep)
    net(x).square().sum().backward()
    handle.remove()
    return [held[0].grad]


def hooked(net, x):
    held = []
    handle = net.down.register_forward_pre_hook(lambda module, args: args[0].register_hook(held.append) and None)
    net(x).square().sum().backward()
    handle.remove()
    return held


def changed(net, x):
    handle = net.down.register_forward_pre_hook(lambda module, args: args[0].register_hook(lambda g: 2 * g) and None)
    net(x).square().sum().backward()
    handle.remove()
    return []


def below(net, x):
    held = []
    handle = net.up.register_full_backward_hook(lambda module, into, out: held.append(out[0]))
    net(x).square().sum().backward()
    handle.remove()
    return held


def asked(net, x):
    hidden = net.hidden(x)
    return list(torch.autograd.grad(net.down(hidden).square().sum(), [hidden]))


def asked_for_both(net, x):
    hidden = net.hidden(x)
    values = net.up.weight.neurograft.theta
    return list(torch.autograd.grad(net.down(hidden).square().sum(), [hidden, values]))


def shared(net, x):
    hidden = net.hidden(x)
    (net.down(hidden).square().sum() + hidden.exp().sum()).backward()
    return []


def twice(net, x):
    hidden = net.hidden(x)
    (net.down(hidden).square().sum() + net.down(hidden * 3).sum()).backward()
    return []


def checkpointed(net, x):
    checkpoint(net, x, use_reentrant=False).square().sum().backward()
    return []


def reentrant(net, x):
    checkpoint(net, x.clone().requires_grad_(), use_reentrant=True).square().sum().backward()
    return []


def anomalous(net, x):
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        net(x).square().sum().backward()
    return []


def accumulated(net, x):
    for part in x:
        net(part).square().sum().backward()
    return []


def in_place(net, x):
    y = net(x)
    y += 1
    y.square().sum().backward()
    return []


LOOKS = [
    kept, hooked, changed, below, asked, asked_for_both, shared, twice, checkpointed, reentrant, anomalous, accumulated,
    in_place,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_whoever_looks_sees_the_whole_gradient(look, monkeypatch):
    net = Gated(F.silu, bias=True)
    found, seen = read(net, IDS, look, False, monkeypatch)
    wanted, shown = read(net, IDS, look, True, monkeypatch)
    for name in IDS:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)
    assert len(seen) == len(shown)
    for mine, theirs in zip(seen, shown):
        torch.testing.assert_close(mine + 0, theirs, rtol=1e-12, atol=1e-12)
        assert mine.shape == theirs.shape
        assert mine.numpy().tolist() == pytest.approx(theirs.numpy())


def test_what_is_held_over_the_pass_keeps_the_numbers_of_the_pass(monkeypatch):
    """The weight moves after it; a gradient kept by a hook must not follow."""
    net = Gated(F.silu, bias=False)

    def hold_and_step(net, x):
        held = hooked(net, x)
        with torch.no_grad():
            net.down.weight.neurograft.theta += 1
        net.down.weight.neurograft.write()
        return held

    _, seen = read(net, IDS, hold_and_step, False, monkeypatch)
    _, shown = read(net, IDS, hold_and_step, True, monkeypatch)
    assert isinstance(seen[0], Deferred)
    torch.testing.assert_close(seen[0] + 0, shown[0], rtol=1e-12, atol=1e-12)


def test_it_is_not_tried_where_a_gradient_goes_on_below(counted, monkeypatch):
    net = Gated(F.silu, bias=False)
    read(net, IDS, backward, False, monkeypatch, x=X.clone().requires_grad_())
    assert counted["made"] == 0


def test_it_is_not_tried_where_a_parameter_joins(counted, monkeypatch):
    net, offset = Gated(F.silu, bias=False), nn.Parameter(torch.zeros(FFN, dtype=torch.float64))
    read(net, IDS, lambda net, x: net.down(net.hidden(x) + offset).sum().backward(), False, monkeypatch)
    assert counted["made"] == 0


def test_a_gradient_that_goes_on_below_is_whole_even_if_it_was_tried(monkeypatch):
    net, x, seen = Gated(F.silu, bias=False), X.clone().requires_grad_(), []
    monkeypatch.setattr(products, "pays", lambda x, tap: True)
    read(net, IDS, backward, False, monkeypatch, x=x)
    seen.append(x.grad)
    x.grad = None
    read(net, IDS, backward, True, monkeypatch, x=x)
    torch.testing.assert_close(seen[0], x.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("off", [False, True])
def test_an_optimizer_that_steps_inside_the_pass_leaves_its_input_gradients_alone(off, monkeypatch):
    """As the tutorial on optimizers fused into the backward pass does it: a step for every gradient that is ready."""
    net = nn.Sequential(Gated(F.silu, bias=False), Gated(F.silu, bias=False))
    if off:
        monkeypatch.setattr(products, "pays", lambda x, tap: False)
    found = []
    for inside in (True, False):
        lives = [live for layer in net for live in lives_of(layer, IDS).values()]
        steps = {id(live.theta): torch.optim.SGD([live.theta], lr=0.01) for live in lives}
        for live in lives:
            tag(live)

        def step(theta, steps=steps, lives=lives):
            steps[id(theta)].step()
            next(live for live in lives if live.theta is theta).stepped()

        if inside:
            for live in lives:
                live.theta.register_post_accumulate_grad_hook(step)
        held = []
        handle = net[0].down.register_forward_pre_hook(
            lambda m, args, held=held: args[0].register_hook(held.append) and None
        )
        net(X).square().mean().backward()
        handle.remove()
        if not inside:
            for live in lives:
                step(live.theta)
        for live in lives:
            assert torch.equal(live.region.read(live.weight.detach()), live.theta.detach())
        found.append([*(live.theta.detach().clone() for live in lives), held[0] + 0])
        for live in lives:
            live.restore()
            untag(live)
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_no_pass_is_under_way_after_one():
    seen, x = [], torch.ones(2, requires_grad=True)
    x.register_hook(lambda g: seen.append(deferred.passing()))
    x.sum().backward()
    assert seen == [True]
    assert not deferred.passing()
