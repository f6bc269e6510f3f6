"""Silencing units in two ways, and comparing what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.seeds import generator
from neurograft.core.taps.tap import change
from neurograft.core.units import Site

# Rounding allowed between the two ways of silencing, relative to the largest output, and what counts as an effect.
ROUNDING, EFFECT = {torch.float64: 1e-9, torch.float32: 1e-5}, {torch.float64: 1e-7, torch.float32: 1e-4}


def some_units(site: Site, seed: int) -> Tensor:
    """Return a third of the units, at least one, sorted."""
    order = torch.randperm(site.n, generator=generator(seed, "verify", site.name))
    return order[: max(1, site.n // 3)].sort().values


@contextmanager
def silent_weights(model: nn.Module, site: Site, ids: Tensor) -> Iterator[None]:
    """Hold the numbers that some units write with at zero, and put them back bit for bit."""
    kept = []
    try:
        with torch.no_grad():
            for i in site.writes:
                part = site.parts[i]
                weight = model.get_parameter(part.param).data.view(-1)
                entries = part.flat(ids.to(weight.device)).reshape(-1)
                kept.append((weight, entries, weight[entries].clone()))
                weight[entries] = 0
        yield
    finally:
        for weight, entries, values in reversed(kept):
            weight[entries] = values


@contextmanager
def silent_taps(model: nn.Module, taps: Mapping[str, Site], ids: Tensor) -> Iterator[None]:
    """Hold the activations of some units at zero; of all units where several taps are silenced."""

    def silence(name: str, x: Tensor) -> Tensor:
        site = taps[name]
        chosen = ids if len(taps) == 1 else torch.arange(site.n)
        axis = x.dim() - (2 if site.tap is not None and site.tap.width > 1 else 1)
        return x.index_fill(axis, chosen.to(x.device), 0)

    with change(model, taps, silence):
        yield


def both_ways(
    model: nn.Module, batch: Mapping[str, Any], site: Site, taps: Mapping[str, Site], ids: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs with some units of a site silenced in the weights, and with them silenced at the taps."""
    with silent_weights(model, site, ids):
        by_weight = outputs(model, batch)
    with silent_taps(model, taps, ids):
        by_tap = outputs(model, batch)
    return by_weight, by_tap


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """Run a model and return its floating outputs; caches are left out."""
    with torch.no_grad():
        return [t.clone() for t in _tensors(model(**batch)) if t.is_floating_point()]


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors(value)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference of two outputs, relative to the largest entry; infinite if one alone is."""
    found = 0.0
    for x, y in zip(a, b, strict=True):
        if not x.numel():
            continue
        fine = torch.isfinite(x)
        if not bool((fine == torch.isfinite(y)).all()):
            return float("inf")
        x, y = x[fine], y[fine]
        if not x.numel():
            continue  # the same entries are out of range in both
        found = max(found, float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)))
    return found


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, expert by expert (as taps inside of fused banks do), and put everything back."""
    modes = [(m, m.training) for m in model.modules()]
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    chosen = [(c, c._experts_implementation) for c in configs.values() if getattr(c, "_experts_implementation", None)]
    model.eval()
    for config, _ in chosen:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in chosen:
            config._experts_implementation = implementation
        for module, training in modes:
            module.training = training
