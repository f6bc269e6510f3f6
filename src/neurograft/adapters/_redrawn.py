"""Numbers as a model's own initializer would draw them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.seeds import seeded


def redrawn(model: nn.Module, name: str, *, seed: int) -> dict[str, Tensor]:
    """Return fresh numbers for every parameter of a module, by the parameter's name; the module stays as it is.

    transformers models draw by `_init_weights`, others by `reset_parameters`.

    Raises:
        RequestError: neither knows how to draw one of the parameters.
    """
    fresh = copy.deepcopy(model.get_submodule(name)).cpu()
    for parameter in fresh.parameters():
        parameter.__dict__.pop("_is_hf_initialized", None)  # the mark of a loaded parameter, which stops the drawing
        parameter.data.fill_(float("nan"))
    draw: Any = getattr(model, "_init_weights", None)
    with seeded(seed, "redrawn", name), torch.no_grad():
        for module in fresh.modules():
            own: Any = getattr(module, "reset_parameters", None)
            if draw is not None:
                draw(module)
            elif own is not None:
                own()
    found = {f"{name}.{leaf}": p.detach() for leaf, p in fresh.named_parameters()}
    left = sorted(n for n, value in found.items() if not bool(torch.isfinite(value).all()))
    if left:
        raise RequestError(
            f"{left[0]} drawn anew", expected="a model whose initializer draws it", do="train it without redrawing"
        )
    return found
