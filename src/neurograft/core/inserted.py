"""An inserted block: a copy of a layer with numbers of its own, run behind the layer it was copied from."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.operation import Operation


@dataclass(frozen=True, eq=False)
class Inserted:
    """A block inserted behind a layer of the model; an `Operation` of grafts.

    The model's own layers keep their names and numbers: the block is no child of the model.

    Args:
        behind: the layer it stands behind and has the shape of.
        index: its number among the layers of a cache, behind those of the model.
        values: parameter of the layer -> the block's numbers, float32.
    """

    behind: str
    index: int
    values: Mapping[str, Tensor]

    scalable = False

    def scaled(self, s: float) -> Inserted:
        """Return itself at strength 1.

        Raises:
            RequestError: another strength.
        """
        if s != 1.0:
            raise RequestError(f"a strength of {s} for {self.describe()}", expected="1", do="leave it at strength 1")
        return self

    def meta(self) -> dict[str, Any]:
        """Return plain data."""
        return {"type": "neurograft.core.inserted.Inserted", "behind": self.behind, "index": self.index}

    def tensors(self) -> dict[str, Tensor]:
        """Return its numbers."""
        return dict(self.values)

    @staticmethod
    def from_parts(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Inserted:
        """Read what `meta` and `tensors` wrote."""
        return Inserted(meta["behind"], meta["index"], tensors)

    def mount(self, model: nn.Module) -> Running:
        """Put it on.

        Raises:
            RequestError: the model has no such layer, or one of another shape.
        """
        layer = dict(model.named_modules()).get(self.behind)
        here = {} if layer is None else {n: tuple(p.shape) for n, p in layer.named_parameters()}
        if here != {n: tuple(v.shape) for n, v in self.values.items()}:
            raise RequestError(
                f"{self.describe()}, of {len(self.values)} tensors",
                expected="a model with this layer, in the shape the block was copied from",
                do="load the base named on the graft's card",
            )
        return Running(model, self.behind, self.index, self.values)

    def fold(self, model: nn.Module) -> dict[str, Slice]:
        """Refuse: the base has no weight for it."""
        raise RequestError(
            f"{self.describe()}, as a weight change", expected="an operation", do="keep it; it ships in the graft"
        )

    def clashes(self, other: Operation) -> bool:
        """Say whether both stand behind one layer, so that their order would matter."""
        return isinstance(other, Inserted) and self.behind == other.behind

    def describe(self) -> str:
        """Return a few words for messages."""
        return f"a block inserted behind {self.behind}"


class Running:
    """An inserted block on a model; called with whatever its layer was called with.

    Args:
        model: the model.
        behind: the layer.
        index: see `Inserted`.
        values: parameter of the layer -> the block's numbers; read at every call, in the layer's dtype and device.
        silent: while these are zero, as at the start of a training, the first call checks that the block passes the
            stream on unchanged.
    """

    def __init__(
        self, model: nn.Module, behind: str, index: int, values: Mapping[str, Tensor], *, silent: Collection[str] = ()
    ) -> None:
        self.layer, self.behind, self.index, self.values = model.get_submodule(behind), behind, index, values
        self.silent, self.resting = tuple(silent), False
        self.block = _bare(self.layer)
        for module in self.block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                vars(module)["layer_idx"] = index
            if hasattr(module, "gradient_checkpointing"):  # recomputed, it would not find the numbers it was given
                vars(module)["gradient_checkpointing"] = False
        self.hook = self.layer.register_forward_hook(self._run, with_kwargs=True)

    def remove(self) -> None:
        """Take it off."""
        self.hook.remove()

    def _run(self, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if self.resting:
            return None
        stream, rest = (out, None) if isinstance(out, Tensor) else (out[0], out[1:])
        named = kwargs if args else {k: v for k, v in kwargs.items() if k != "hidden_states"}
        _room((*args, *kwargs.values()), self.index, layer)
        numbers = {n: self.values[n].to(p.device, p.dtype) for n, p in layer.named_parameters()}
        self.block.train(layer.training)
        made = functional_call(self.block, {**dict(layer.named_buffers()), **numbers}, (stream, *args[1:]), named)
        new = made if isinstance(made, Tensor) else made[0]
        if self.silent:
            start, self.silent = not any(bool(self.values[n].any()) for n in self.silent), ()
            if start and not torch.equal(new, stream):
                raise RequestError(
                    f"{type(layer).__name__}, which changes the stream where its sub-layers contribute nothing",
                    expected="a pre-norm block, which then passes it on as it is",
                    do="choose a model with norms before the sub-layers (ViT, Llama, GPT-2), or another adapter",
                )
        return new if rest is None else type(out)((new, *rest))


def _bare(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer without the hooks on it, and with no numbers: they are given at every call."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in layer.parameters()}
    for module in layer.modules():  # a hook knows its owner, and with it maybe the whole model
        memo |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
    return copy.deepcopy(layer, memo)


def _room(given: Iterable[Any], index: int, layer: nn.Module) -> None:
    """Give a cache among what a layer is given a place for the block's keys and values.

    Raises:
        RunError: a cache of another kind than one that grows.
    """
    cache = next((g for g in given if hasattr(g, "layer_class_to_replicate")), None)
    if cache is None or cache.layer_class_to_replicate is not None:
        return
    layers = cache.layers
    if not layers or type(layers[0]).__name__ != "DynamicLayer":
        raise RunError(
            f"a block inserted behind a {type(layer).__name__} cannot use this {type(cache).__name__}; "
            "pass use_cache=False"
        )
    while len(layers) <= index:
        layers.append(type(layers[0])())
