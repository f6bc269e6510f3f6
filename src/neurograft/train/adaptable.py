"""The units of a backbone that a path may tune or adapt, and the features it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neurograft.core.errors import RequestError


@dataclass(frozen=True)
class Unit:
    """One adaptable unit.

    Args:
        name: of its module.
        copied: parameters that have a tuned copy.
        middle: a convolution's weight whose middle the adapter moves, or None.
        offsets: biases that the adapter moves.
        attention: the module that takes a prefix, or None.
    """

    name: str
    copied: tuple[str, ...]
    middle: str | None = None
    offsets: tuple[str, ...] = ()
    attention: str | None = None


def units_of(model: nn.Module) -> list[Unit]:
    """Return the convolutions of a ResNet, or the blocks of a ViT, in their order.

    Raises:
        RequestError: a model that has neither.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> [unit.name for unit in units_of(pico("vit"))]
        ['vit.layers.0', 'vit.layers.1']
    """
    convolutions = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and not n.endswith("patch_embeddings.projection")
    ]
    found = [Unit(n, (f"{n}.weight",), middle=f"{n}.weight") for n, m in convolutions if _centred(m)]
    for name, block in model.named_modules() if not found else ():
        inside = dict(block.named_modules())
        if {"attention.o_proj", "attention.k_proj", "attention.v_proj", "mlp.fc2"} <= inside.keys():
            copied = tuple(f"{name}.{n}" for n, _ in block.named_parameters())
            offsets = (f"{name}.attention.o_proj.bias", f"{name}.mlp.fc2.bias")
            found.append(Unit(name, copied, offsets=offsets, attention=f"{name}.attention"))
    if not found or not hasattr(model, "base_model"):
        raise RequestError(
            f"{type(model).__name__}, which has no units to copy and adapt",
            expected="a ResNet or a ViT of transformers, or a model laid out as one of them",
            do="choose such a backbone",
        )
    return found


def _centred(conv: nn.Conv2d) -> bool:
    """Say whether a 1 x 1 convolution beside it reads the middle of its kernel."""
    sides = zip(conv.kernel_size, conv.padding if isinstance(conv.padding, tuple) else (-1, -1))
    return conv.groups == 1 and all(k % 2 == 1 and p == (k - 1) // 2 for k, p in sides)


def pooled(model: nn.Module) -> Callable[..., Tensor]:
    """Return inputs -> features [B, d]: what the model's base pools, or its first token."""

    def features(**inputs: Tensor) -> Tensor:
        base: Any = model.base_model
        found = base(**inputs)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    return features


class Featured(nn.Module):
    """A model that gives its features, for `functional_call`.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.features = model, pooled(model)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return features [B, d]."""
        return self.features(**inputs)
