"""A decoder whose layers are reversible blocks: the network of RevFFN, put into a pretrained one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.operation import Operation
from neurograft.networks._coupling import PARTS, Block, Tape
from neurograft.networks._reversing import Wrapped

FORMS = ("standard", "coupled")
UP, DOWN = "half_up", "half_down"


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a decoder's layers by name, from the lowest.

    Raises:
        RequestError: it has no stack of layers that can be reversible blocks.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> list(layers(pico("llama")))
        ['model.layers.0', 'model.layers.1']
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            fit = [any(all(hasattr(layer, n) for n in names) for names in PARTS) for layer in module]
            if all(fit):
                return {f"{name}.{i}" if name else str(i): layer for i, layer in enumerate(module)}
    raise RequestError(
        f"a {type(model).__name__} without a stack of decoder layers known here",
        expected="layers with two norms, attention and FFN, each norm before its branch",
        do="use a Llama-, Qwen-, Mixtral- or GPT-2-like decoder",
    )


def halves(model: nn.Module) -> dict[str, Tensor]:
    """Return P_up [d, d / 2] and P_down [d / 2, d] for every layer: both halves get the half, the half their mean.

    Raises:
        RequestError: the width is odd.
    """
    found = {}
    for name, layer in layers(model).items():
        norm = next(getattr(layer, names[0]) for names in PARTS if hasattr(layer, names[0]))
        width, odd = divmod(norm.weight.numel(), 2)
        if odd:
            raise RequestError(
                f"hidden states of width {2 * width + 1}", expected="an even width", do="use another model"
            )
        dtype = torch.float64 if norm.weight.dtype == torch.float64 else torch.float32
        eye = torch.eye(width, dtype=dtype, device=norm.weight.device)
        found[f"{name}.{UP}"], found[f"{name}.{DOWN}"] = torch.cat([eye, eye]), torch.cat([eye, eye], 1) / 2
    return found


class Reversing:
    """Layers wrapped as reversible blocks, and the way back."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], tape: Tape) -> None:
        one_of(tape.form, FORMS, what="form")
        found = layers(model)
        wanted = {f"{name}.{leaf}" for name in found for leaf in (UP, DOWN)}
        if wanted != weights.keys():
            raise RequestError(
                f"projections for {sorted(weights)[:2]}",
                expected=f"those of {sorted(wanted)[:2]}",
                do="use its own base",
            )
        if any("forward" in vars(layer) for layer in found.values()):
            raise RequestError(
                "layers whose forward is replaced already",
                expected="a plain model",
                do="take the other change off first",
            )
        last, self.tape, self.wrapped = len(found) - 1, tape, []
        for i, (name, layer) in enumerate(found.items()):
            block = Block(layer, weights[f"{name}.{UP}"], weights[f"{name}.{DOWN}"], tape, i == 0, i == last)
            self.wrapped.append((layer, Wrapped(block)))
        self.put()

    def put(self) -> None:
        """Let the layers run as blocks."""
        for layer, wrapped in self.wrapped:
            layer.forward = wrapped  # type: ignore[assignment]

    def remove(self) -> None:
        """Let the layers run as they are."""
        for layer, _ in self.wrapped:
            vars(layer).pop("forward", None)


class Reversible:
    """The operation of a graft that was trained with reversible blocks, without which its numbers mean nothing.

    Args:
        form: "standard" or "coupled".
        weights: "<layer>.half_up" [d, d / 2] and "<layer>.half_down" [d / 2, d].
    """

    scalable = False

    def __init__(self, form: str, weights: Mapping[str, Tensor]) -> None:
        self.form, self.weights = form, dict(weights)

    @staticmethod
    def from_parts(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reversible:
        """Read what `meta` and `tensors` wrote."""
        return Reversible(meta["form"], tensors)

    def meta(self) -> dict[str, Any]:
        """Return plain data."""
        return {"type": "neurograft.networks.reversible.Reversible", "form": self.form}

    def tensors(self) -> dict[str, Tensor]:
        """Return the projections."""
        return self.weights

    def mount(self, model: nn.Module) -> Reversing:
        """Wrap the layers.

        Raises:
            RequestError: the model has other layers.
        """
        device = next(model.parameters()).device
        return Reversing(model, {n: w.to(device) for n, w in self.weights.items()}, Tape(self.form, verify=0))

    def fold(self, model: nn.Module) -> dict[str, Slice]:
        """Refuse: another network is no change of numbers."""
        raise RequestError(self.describe(), expected="a change of numbers", do="ship it as it is, in the graft")

    def clashes(self, other: Operation) -> bool:
        """Say whether both put blocks into the same layers."""
        return isinstance(other, Reversible)

    def scaled(self, s: float) -> Reversible:
        """Return itself; it has no strength."""
        return self

    def describe(self) -> str:
        """Return a few words for messages."""
        return f"reversible blocks of the {self.form} form"
