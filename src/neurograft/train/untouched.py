"""A verb leaves the model as it found it: modes, hooks, configs, buffers, devices, and the global random state."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back, at the end of the block, all of a model but the numbers in its parameters, which the mount restores.

    Trainers set modes and config fields, wrap `forward`, turn on checkpointing, register hooks, move the model.
    Batch statistics belong to the base: layers that keep them stay in evaluation mode inside the block.

    Args:
        model: the model.
    """
    found = [_Kept(m) for m in model.modules()]
    configs = [_Kept(c) for c in _configs(model)]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    places = [(p, p.device) for p in model.parameters()]
    for module in averaging(model):
        module.eval()
        module.train = types.MethodType(_stay, module)  # type: ignore[method-assign]
    try:
        with random_state():
            yield
    finally:
        for kept in [*found, *configs]:
            kept.restore()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, device in places:
            if parameter.device != device:
                parameter.data = parameter.data.to(device)


def averaging(model: nn.Module) -> list[nn.Module]:
    """Return the layers that keep running statistics of batches, which are the base's and no part of a graft."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None]


@contextmanager
def random_state() -> Iterator[None]:
    """Put Python's, NumPy's and torch's global random states back at the end of the block."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class _Kept:
    """The attributes of an object; its dicts and lists are restored in place, since handles point to them."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing
        self.attributes = dict(vars(thing))
        self.inside = [(v, v.copy()) for v in self.attributes.values() if isinstance(v, (dict, list, set))]

    def restore(self) -> None:
        mine = vars(self.thing)
        for name in set(mine) - set(self.attributes):
            del mine[name]
        mine.update(self.attributes)
        for container, copy in self.inside:
            if not _same(container, copy):
                container.clear()
                container.extend(copy) if isinstance(container, list) else container.update(copy)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, set):
        return bool(one == other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(one[k] is other[k] for k in one)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other))


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}

    def add(thing: Any) -> None:
        if hasattr(thing, "to_dict") and hasattr(thing, "__dict__") and id(thing) not in found:
            found[id(thing)] = thing
            for value in vars(thing).values():
                add(value)

    for module in model.modules():
        for value in vars(module).values():
            if not isinstance(value, (nn.Module, torch.Tensor, type)):
                add(value)
    return list(found.values())


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
