"""Reducing a parameter's numbers, or its gradient's, to one number for each unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.units import Parameters, Part, Site


def view(part: Part, tensor: Tensor) -> Tensor:
    """Return the units' numbers as a strided view of a contiguous tensor of the parameter's shape, [n, repeat, run].

    Example:
        >>> view(Part.columns("w", (2, 3)), torch.arange(6.0).view(2, 3)).reshape(3, 2).tolist()
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    counts, strides = zip(*part.units)
    tensor = tensor.detach().contiguous()
    found = tensor.as_strided(
        (*counts, part.repeat, part.run), (*strides, part.repeat_stride, 1), tensor.storage_offset() + part.start
    )
    return found.reshape(part.n, part.repeat, part.run) if len(counts) > 1 else found


def summed(part: Part, tensor: Tensor) -> Tensor:
    """Return the sum of each unit's numbers, float32 [n] on the CPU."""
    return view(part, tensor).sum(dim=(1, 2), dtype=torch.float32).cpu()


def squared(part: Part, tensor: Tensor) -> Tensor:
    """Return the sum of the squares of each unit's numbers, float32 [n] on the CPU."""
    return view(part, tensor.detach().float().square()).sum(dim=(1, 2)).cpu()


def owners(sites: Mapping[str, Site], model: nn.Module) -> dict[str, list[tuple[str, Part]]]:
    """Return parameter -> (site, part) for every part of the sites, tied names folded onto the first.

    Raises:
        RequestError: a site whose units own no weights.
    """
    alias = Parameters.of(model).alias
    found: dict[str, list[tuple[str, Part]]] = {}
    for name, site in sites.items():
        if not site.parts:
            raise RequestError(
                f"the site {name!r}, whose units own no weights",
                expected="units with weights",
                do="choose another kind of unit, or a locator that reads activations",
            )
        for part in site.parts:
            found.setdefault(alias[part.param], []).append((name, part))
    return found


def norms(site: Site, model: nn.Module, parts: Callable[[int], bool] = lambda i: True) -> Tensor:
    """Return the Euclidean norm of each unit's numbers over the chosen parts, float32 [n]."""
    parameters = Parameters.of(model)
    total = torch.zeros(site.n)
    for i, part in enumerate(site.parts):
        if parts(i):
            total += squared(part, parameters.by_name[parameters.alias[part.param]])
    return total.sqrt()


def numbers(site: Site) -> int:
    """Return how many numbers a unit owns."""
    return sum(math.prod((part.repeat, part.run)) for part in site.parts)
