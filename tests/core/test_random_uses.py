"""Uses, steps and looks of a live weight drawn at random, against a dense twin in float64."""

import random

import pytest
import test_uses
import torch
from test_uses import OPERATIONS, known, rand, regions
from torch import nn
from torch.utils.checkpoint import checkpoint

from neurograft.core.compact import gradients
from neurograft.core.compact.live import Live
from neurograft.core.compact.uses import tag, untag
from neurograft.core.region import Region

__all__ = ["known"]  # a fixture: what grouped_mm computes, in float64
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CASTS = ("cast, then linear",)  # to float64


def uses_of(rng, dtype):
    """One to three uses of weights of one shape."""
    known_ones = [n for n in OPERATIONS if dtype == torch.float64 or n not in CASTS]
    first = rng.choice(known_ones)
    alike = [
        n
        for n in known_ones
        if OPERATIONS[n][0] == OPERATIONS[first][0] and regions(n)[0].matrix == regions(first)[0].matrix
    ]
    return [first, *rng.choices(alike, k=rng.randint(0, 2))]


def region_of(rng, name):
    """Some ids of some layout: one, a few, all but one, or all."""
    some = rng.choice(regions(name))
    if some.layout == "all":
        return some
    total = some.total
    ids = rng.sample(range(total), rng.choice([1, max(1, total // 3), max(1, total - 1), total]))
    return Region.of(some.shape, some.layout, ids, matrix=some.matrix, block=some.block)


def placed(rng, numbers):
    """The numbers as a frozen parameter, in a storage of its own or inside a larger one."""
    room = torch.zeros(3 * numbers.numel(), dtype=numbers.dtype)
    first = rng.choice([0, 1, numbers.numel()])
    return nn.Parameter(room[first:][: numbers.numel()].view(numbers.shape).copy_(numbers), requires_grad=False)


def given(monkeypatch, narrow, dtype):
    """Let the operations compute in `dtype`, from numbers that were rounded to `narrow`."""
    for name, value in (("X", rand(2, 7, 8)), ("IMAGE", rand(2, 4, 9, 9)), ("LINE", rand(2, 4, 11))):
        monkeypatch.setattr(test_uses, name, value.to(narrow).to(dtype))
    monkeypatch.setattr(test_uses, "rand", lambda *shape, seed=0: rand(*shape, seed=seed).to(narrow).to(dtype))


def loss(names, weight, reentrant=None):
    """Something that is not linear in any use, so that uses meet in the gradient."""
    total = 0.0
    for number, name in enumerate(names):
        anchor = torch.ones((), dtype=weight.dtype, requires_grad=True)
        run = lambda one, name=name: OPERATIONS[name][1](weight) * one  # noqa: E731
        out = run(anchor) if reentrant is None else checkpoint(run, anchor, use_reentrant=reentrant)
        total = total + (number + 1) * out.double().square().mean()
    return total


@pytest.mark.parametrize("seed", range(80))
def test_any_uses_train_like_the_dense_twin(seed, monkeypatch):
    rng = random.Random(seed)
    for name, values in {"DENSE": [0.15, 0.0, 2.0], "LOOP": [2, 0], "CHUNK": [256, 4], "BLOCKS": [0.1, 2.0]}.items():
        monkeypatch.setattr(gradients, name, rng.choice(values))
    dtype = rng.choice([torch.float64, torch.float64, *TOLERANCE])
    names = uses_of(rng, dtype)
    region, reentrant = region_of(rng, names[0]), rng.choice([None, None, False, True])
    base = rand(*region.shape, seed=seed).to(dtype)
    weight, twin = placed(rng, base), nn.Parameter(base.double())
    live = Live("w", weight, region)
    tag(live)
    chosen = torch.zeros(base.numel()).index_fill(0, region.flat(), 1.0).view(base.shape)
    optimizers = [torch.optim.SGD([p], lr=0.01) for p in (live.theta, twin)]
    for _ in range(2 if dtype == torch.float64 else 1):
        live.theta.grad = twin.grad = None
        for _ in range(rng.choice([1, 2])):
            given(monkeypatch, dtype, dtype)
            loss(names, weight, reentrant).backward()
            with torch.no_grad():
                loss(names, weight)
            given(monkeypatch, dtype, torch.float64)
            loss(names, twin).backward()
        scale = float(twin.grad.abs().max())
        found = live.theta.grad.double()
        torch.testing.assert_close(found, region.read(twin.grad), rtol=0, atol=TOLERANCE[dtype] * scale)
        twin.grad.mul_(chosen)
        for optimizer in optimizers:
            optimizer.step()
    if dtype == torch.float64:
        given(monkeypatch, dtype, dtype)
        loss(names, weight)  # a use writes
        untag(live)
        torch.testing.assert_close(weight, twin, rtol=0, atol=1e-9, check_device=False)
    assert weight.grad is None
