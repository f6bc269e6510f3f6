"""Batches with padding on either side, token selectors and failures drawn at random, against plain indexing."""

import random

import pytest
import torch

from neurograft.core.context import token_mask
from neurograft.core.taps.board import ATTRIBUTE
from neurograft.core.taps.reducers import Exemplars, Extremes, Moments, Rate, Sample
from neurograft.core.taps.stream import observe
from neurograft.core.taps.table import table
from neurograft.core.taps.tap import change, gradients, watch
from neurograft.core.units import Site, Tap
from neurograft.worlds.pico import pico

SITE = {"n": Site("n", "neuron", 48, tap=Tap("model.layers.1.mlp.down_proj", "input"), layer=1)}
POSITIONS = ("all", "last", "answer", "prompt", lambda batch: batch["input_ids"] % 2 == 0)


def some_batch(rng):
    rows, length = rng.choice([1, 2, 3]), rng.choice([2, 4, 7])
    ids = torch.tensor([[rng.randrange(3, 9) for _ in range(length)] for _ in range(rows)])
    real, side = torch.ones_like(ids), rng.choice(["left", "right", "none"])
    for row in real:
        gone = rng.randrange(length - 1) if side != "none" else 0
        row[:gone] = int(side != "left")
        row[length - gone :] = int(side == "left" or not gone)
    labels = ids.masked_fill(real == 0, -100)
    for row, here in zip(labels, real):
        first = int(here.nonzero()[0, 0])
        row[: first + rng.randint(1, max(1, int(here.sum()) - 1))] = -100
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def plainly(model, batches, positions):
    """The counted activations [tokens, n] and their (example, position), by a hook and an index."""
    module, passed = model.model.layers[1].mlp.down_proj, []
    hook = module.register_forward_pre_hook(lambda m, args: passed.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    first, rows, places = 0, [], []
    for batch, x in zip(batches, passed):
        flags = token_mask(batch, positions)
        rows.append(x[flags])
        places.append(flags.nonzero() + torch.tensor([first, 0]))
        first += len(x)
    return rows, places, first


def hooks(model):
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), ATTRIBUTE in m.__dict__, "forward" in m.__dict__)
        for m in model.modules()
    ]


@pytest.mark.parametrize("seed", range(12))
def test_streams_equal_plain_indexing(seed):
    rng, model = random.Random(seed), pico("llama").eval()
    positions = POSITIONS[seed % len(POSITIONS)]
    batches = [some_batch(rng) for _ in range(3)]
    rows, places, examples = plainly(model, batches, positions)
    assert all(len(r) for r in rows), "another seed: a batch in which nothing counts is refused"
    x, where = torch.cat(rows), torch.cat(places)

    def make(n):
        return {
            "moments": Moments(n), "rate": Rate(n, above=0.01), "ends": Extremes(n),
            "sample": Sample(n), "top": Exemplars(n, k=3),
        }  # fmt: skip

    seen = observe(model, SITE, batches, make, mask=positions)["n"]
    torch.testing.assert_close(seen["moments"].mean, x.double().mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen["moments"].variance, x.double().var(0, correction=0), rtol=0, atol=1e-6)
    assert torch.equal(seen["rate"].rate, (x > 0.01).double().mean(0))
    assert torch.equal(seen["ends"].absolute, x.abs().amax(0))
    torch.testing.assert_close(seen["sample"].quantile(0.9), torch.quantile(x, 0.9, dim=0))
    best = x.sort(dim=0, descending=True, stable=True)
    k = min(3, len(x))
    assert torch.equal(seen["top"].values[:k], best.values[:k])
    assert torch.equal(seen["top"].places[:k], where[best.indices[:k]])
    for pool, by in (("max", lambda r: r.amax(0)), ("mean", lambda r: r.mean(0))):
        found = table(model, SITE, batches, pool=pool, positions=positions)["n"]
        for example in range(examples):
            mine = x[where[:, 0] == example]
            wanted = by(mine) if len(mine) else torch.zeros(48)
            torch.testing.assert_close(found[example], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [watch, change, gradients])
def test_a_failure_in_the_middle_leaves_no_hook(block):
    model = pico("llama").eval()
    before, flags = hooks(model), [p.requires_grad for p in model.parameters()]
    batch = some_batch(random.Random(0))

    def fail(*args):
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError), block(model, SITE, fail):
            model(**batch).loss.backward()
        assert hooks(model) == before
        assert [p.requires_grad for p in model.parameters()] == flags
