"""How deep each parameter lies: the embeddings at 0, the layers from 1, pooler, final norm and head behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from neurograft.anatomy.describe import anatomy
from neurograft.core.errors import RequestError
from neurograft.core.units import Parameters


@dataclass(frozen=True)
class Depths:
    """The depth of every parameter of a model.

    Args:
        by_name: parameter -> depth: 0 embeddings, 1 to `layers` the layers from the bottom, `layers` + 1 the rest.
        layers: number of layers.

    Example:
        >>> found = Depths({"emb.w": 0, "l.0.w": 1, "head.w": 2}, 1)
        >>> found.of("l.0.w.lora_A"), found.of("head.w")
        (1, 2)
    """

    by_name: Mapping[str, int]
    layers: int

    def of(self, name: str) -> int:
        """Return the depth of a trainable tensor: a parameter, or something named after one."""
        owner = name
        while owner and owner not in self.by_name:
            owner = owner.rpartition(".")[0]
        if not owner:
            raise RequestError(
                f"the depth of {name!r}", expected="a tensor named after a parameter", do="name one of this model"
            )
        return self.by_name[owner]

    def inside(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Return the names that lie in layers, by the layer's depth."""
        found: dict[int, list[str]] = {}
        for name in names:
            depth = self.of(name)
            if 1 <= depth <= self.layers:
                found.setdefault(depth, []).append(name)
        return found


def depths(model: nn.Module) -> Depths:
    """Measure a model.

    What belongs to no layer has depth 0 if it is an embedding or comes before the first layer in the order of the
    model, and lies behind the layers if it comes after the last; between two layers (as an encoder's last norm,
    before the decoder) it counts to the one before. A norm called final lies behind the layers wherever it stands.

    Raises:
        RequestError: the model has no layers that are known.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> found = depths(pico("llama"))
        >>> [found.of(f"model.{n}.weight") for n in ("embed_tokens", "layers.1.mlp.up_proj", "norm")]
        [0, 2, 3]
    """
    known = anatomy(model)
    if not known.layers:
        raise RequestError(
            f"a {type(model).__name__} without known layers{f' ({known.note})' if known.note else ''}",
            expected="a model of repeated layers",
            do="choose a schedule or adapter that needs no depth",
        )
    final = {n for n in known.norms if "final" in n.rpartition(".")[2]}
    lookups = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)} | {known.embedding or ""}
    found: dict[str, int] = {}
    last, names = 0, list(Parameters.of(model).by_name)
    inside = {n: i for i, layer in enumerate(known.layers, 1) for n in names if n.startswith(layer + ".")}
    left = len(inside)
    for name in names:
        if name in inside:
            last, left = inside[name], left - 1
            found[name] = last
            continue
        owner = name.rpartition(".")[0]
        behind = owner in final or not left
        found[name] = 0 if owner in lookups else len(known.layers) + 1 if behind else last
    return Depths(found, len(known.layers))
