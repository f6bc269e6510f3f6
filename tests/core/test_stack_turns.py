"""Grafts on and off in random turns, against a slow literal twin that makes every number anew from the base."""

import random

import pytest
import torch
from torch import nn

from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.coordinates import coordinates, everything, holders
from neurograft.core.grafts.delta import LowRank, Shut, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import ATTRIBUTE, Stack
from neurograft.core.region import Region, as_matrix
from neurograft.core.seeds import generator
from neurograft.worlds.pico import pico

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def odd(model):
    """Put numbers among a model's that a comparison of floats would confuse: NaNs of two payloads, both zeros."""
    for tensor in holders(model).values():
        wide = 8 * tensor.element_size() - 1
        nan = int(torch.tensor(float("nan"), dtype=tensor.dtype).view(BITS[tensor.dtype]))
        strange = torch.tensor([nan, nan | 5, nan | -(1 << wide), -(1 << wide), 0], dtype=BITS[tensor.dtype])
        flat = tensor.data.view(-1)
        flat.view(BITS[tensor.dtype])[: len(strange)] = strange[: len(flat)]
    return model


def plain(dtype):
    """A convolution, which some changes read as one matrix and others as a bank, and two linear layers."""
    model, rng = nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(8, 6), nn.Linear(6, 4)), generator(0, "plain")
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng)
    return odd(model.to(dtype))


def banks(dtype):
    """Experts whose checkpoint holds them one by one, and whose parameter holds them all."""
    return odd(pico("mixtral", dtype=dtype, num_hidden_layers=1, num_local_experts=3))


def tied(dtype):
    return odd(pico("llama", dtype=dtype, num_hidden_layers=1, tie_word_embeddings=True))


def chosen(shape, layout, rng, *, bank=None):
    """A region with about a quarter of a layout's ids."""
    matrix, block = as_matrix(shape, bank=bank), (2, 2) if layout == "block" else None
    if layout == "all":
        return everything(shape, matrix)
    total = Region.of(shape, layout, matrix=matrix, block=block).total
    ids = torch.randperm(total, generator=rng)[: max(1, total // 4)]
    return Region.of(shape, layout, ids, matrix=matrix, block=block)


def change(shape, rng, kinds=("rows", "cols", "block", "flat", "all", "low", "shut", "conv")):
    """A random change of one tensor."""
    kind = kinds[int(torch.randint(len(kinds), (), generator=rng))]
    if kind == "low" and len(shape) == 2:
        return LowRank(shape, *(torch.randn(s, generator=rng) for s in ((2, shape[1]), (shape[0], 2))), 0.1)
    if kind == "shut":
        return Shut(chosen(shape, "flat", rng))
    if kind not in ("rows", "cols", "all") or len(shape) < 2 or (kind == "block" and len(shape) > 2):
        kind = "rows" if kind == "conv" and len(shape) > 2 else "block" if kind == "block" and even(shape) else "flat"
        region = chosen(shape, kind, rng, bank=False if kind == "rows" else None)
    else:
        region = chosen(shape, kind, rng)
    values = torch.randn(region.values_shape, generator=rng)
    values.view(-1)[:2] = torch.tensor([-0.0, float("nan")])[: values.numel()]
    return Slice(region, values)


def even(shape):
    return len(shape) == 2 and shape[0] % 2 == 0 and shape[1] % 2 == 0


def some_grafts(model, seed, count=5):
    """Overlapping grafts of random kinds, some scaled, one of them of a single tensor."""
    rng, shapes = generator(seed, "grafts"), coordinates(model).names()
    made = []
    for i in range(count):
        names = [n for n in shapes if torch.rand((), generator=rng) < 0.8] if i else list(shapes)[:1]
        graft = Graft.made(model, {n: change(shapes[n], rng) for n in names})
        made.append(graft.scale((1.0, 1.0, 0.5, 1.0, -1.5)[i % 5]))
    return made


def literal(model, base, grafts):
    """Every number from the base's: of one unscaled change its value, else base + sum of s (value - base)."""
    found, where = {}, coordinates(model)
    for name, before in base.items():
        wide = torch.float64 if before.dtype == torch.float64 else torch.float32
        start = before.to(wide).reshape(-1)
        total, alone = start.clone(), start.clone()
        count, shut = torch.zeros(len(start)), torch.zeros(len(start), dtype=torch.bool)
        for graft in sorted(grafts, key=lambda g: g.identity):
            for tensor, delta in graft.deltas.items():
                whole = everything(delta.shape, as_matrix(delta.shape))
                for piece in where.to_module(tensor, whole):
                    if piece.name != name:
                        continue
                    at, dense, mask = piece.region.flat(), torch.zeros(delta.shape), torch.ones(delta.shape).bool()
                    if isinstance(delta, LowRank):
                        value = start[at] + piece.take(delta.product()).reshape(-1).to(wide)
                    else:
                        mask = torch.zeros(delta.shape, dtype=torch.bool)
                        mask.view(-1)[delta.region.flat()] = True
                        dense.view(-1)[delta.region.flat()] = delta.values.reshape(-1)
                        value = piece.take(dense).reshape(-1).to(wide)
                    held = piece.take(mask).reshape(-1)
                    at, value = at[held], value[held]
                    if isinstance(delta, Shut) and graft.strength == 1.0:
                        fresh = ~shut[at]
                        shut[at] = True
                        at, value = at[fresh], value[fresh]
                    total[at] += graft.strength * (value - start[at])
                    alone[at] = value
                    count[at] += 1 if graft.strength == 1.0 else 2
        numbers = torch.where(count <= 1, alone, total).to(before.dtype)
        found[name] = torch.where(count > 0, numbers, before.reshape(-1)).reshape(before.shape)
    return found


def bits(model):
    return {n: t.detach().clone() for n, t in holders(model).items()}


def equal(found, wanted):
    wrong = [n for n in wanted if not same_bits(found[n], wanted[n])]
    assert found.keys() == wanted.keys()
    assert not wrong, wrong


WORLDS = [(plain, d) for d in BITS] + [(w, d) for w in (banks, tied) for d in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("world", "dtype"), WORLDS)
def test_random_turns_of_on_off_and_other_strengths_equal_the_literal_twin(world, dtype, seed):
    model, turns = world(dtype), random.Random(seed)
    base, grafts = bits(model), some_grafts(model, seed)
    on: dict[str, Graft] = {}
    for _ in range(30 if world is plain else 14):
        graft = turns.choice(grafts)
        if graft.identity in on:
            on.pop(graft.identity).remove(model)
        else:
            on[graft.identity] = graft.scale(turns.choice((1.0, 1.0, 0.5)))
            on[graft.identity].apply(model)
        equal(bits(model), literal(model, base, on.values()))
    stack = Stack.of(model)
    for name, weight in holders(model).items():
        region = chosen(tuple(weight.shape), "flat", generator(seed, name))
        assert same_bits(stack.original(name, weight, region), region.read(base[name]))
    where = coordinates(model)
    assert all(same_bits(stack.base(n, model, where), coordinates(world(dtype)).read(n)) for n in where.names())
    for graft in turns.sample(list(on.values()), len(on)):
        graft.remove(model)
    equal(bits(model), base)
    assert ATTRIBUTE not in model.__dict__
