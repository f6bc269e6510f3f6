"""The side path: weights that are never written, beside which every use adds what the trained values differ."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.adapters._in_place import InPlaceMount
from neurograft.adapters._settled import Settled
from neurograft.adapters._turning import SliceMount
from neurograft.core.compact.additions import product
from neurograft.core.compact.beside import Beside, Left, Onward
from neurograft.core.compact.live import Live
from neurograft.core.compact.uses import LiveWeight
from neurograft.core.context import Trained
from neurograft.core.errors import RequestError
from neurograft.core.linears import is_linear, transposed
from neurograft.core.region import Region


class SideMount(SliceMount):
    """Values trained beside frozen weights.

    The trainable tensor of a weight holds values, as on the in-place route, so that weight decay means the
    same; every use of the weight adds what they differ from the base. Plain weights are live ones that are not
    written; a linear layer that is packed or sharded gets a hook. Parameters the base lacks are trained in place.
    What a turn to other units leaves behind goes on being added, at the price of a product with as many numbers.
    """

    appends = True

    def _live(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if _plain(weight) and not _packs(module):
            return Beside(name, weight, region, allow_dense=self.allow_dense)
        if self.found.tied(name):
            raise RequestError(
                f"{name} on the side path, packed and tied with {', '.join(self.found.tied(name))}",
                expected="a packed weight with one use",
                do="leave it out of the selection, or load the base unquantized",
            )
        return Packed(name, module, leaf, region)

    def _onward(self, name: str, weight: nn.Parameter, region: Region) -> Live:
        past = self.past.get(name)
        if past is None:
            return self._live(name, weight, region)
        return Onward(name, weight, region, past.region, past.values, allow_dense=self.allow_dense)

    def _tag(self, lives: list[Live]) -> None:
        trained, weights = {live.name for live in lives}, self.found.by_name
        idle = {n: past for n, past in self.past.items() if n not in trained}
        self.idle = [Left(n, weights[n], past.region, past.values) for n, past in idle.items()]
        super()._tag(lives)

    def _settled(self, live: Live) -> Settled:
        assert isinstance(live, Beside)
        return Settled.of(*live.trained, live.theta)

    def regions(self) -> dict[str, Region]:
        """Return which entries of which weights are trained."""
        return {live.name: live.trained[0] for live in self.lives if isinstance(live, Beside)}

    def held(self) -> dict[str, Trained]:
        """Return what is trained of each parameter."""
        return {live.name: Trained(live.theta, *live.trained) for live in self.lives if isinstance(live, Beside)}

    def _leave(self, *, base: bool) -> None:
        """Nothing to write: what was left behind is added at every use."""

    @contextmanager
    def _shown(self, lives: list[Live]) -> Iterator[None]:
        """Let the weights be copies with the values in them for a moment; the base itself is not written.

        Raises:
            RequestError: a weight is packed, offloaded or sharded.
        """
        packed = next((live.name for live in lives if isinstance(live, Packed)), None)
        if packed is not None:
            raise RequestError(
                f"another selection on a model whose {packed} is trained beside packed numbers",
                expected="plain weights, in which a locator can be shown the values trained so far",
                do="load the base unquantized, or take a schedule that does not select anew",
            )
        weights = [(live.weight, live.weight.data, live) for live in (*lives, *self.idle)]
        try:
            for weight, _, live in weights:
                weight.data = live.copied()
            yield
        finally:
            for weight, base, _ in weights:
                weight.data = base

    @staticmethod
    def _checked(name: str, weight: nn.Parameter) -> nn.Parameter:
        return InPlaceMount._checked(name, weight) if isinstance(weight, LiveWeight) else weight

    def _on(self, live: Live) -> None:
        if isinstance(live, Packed):
            live.hook()
        else:
            super()._on(live)

    def _off(self, live: Live) -> None:
        if isinstance(live, Packed):
            live.unhook()
        else:
            super()._off(live)

    def _lost(self, live: Live) -> bool:
        return not isinstance(live, Packed) and super()._lost(live)


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _plain(weight: nn.Parameter) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.is_contiguous()


def _packs(module: nn.Module) -> bool:
    """Say whether a layer holds packed or sharded weights, and has a kernel of its own for them and its bias."""
    held = (p for p in module._parameters.values() if p is not None)
    return any(type(p) is not nn.Parameter or p.dtype not in FLOATS for p in held)


class Packed(Beside):
    """The trainable side of a linear layer whose weight is no plain parameter: a hook adds to the layer's output.

    Args:
        name: the weight's name.
        owner: the layer: `nn.Linear`, GPT-2's `Conv1D`, or a quantized linear that dequantizes.
        leaf: the name of the weight, or of the bias, in the layer.
        region: its trained entries.
    """

    def __init__(self, name: str, owner: nn.Module, leaf: str, region: Region) -> None:
        super().__init__(name, nn.Parameter(dequantized(name, owner, leaf), requires_grad=False), region)
        self.weight, self.owner = getattr(owner, leaf), owner
        self.transposed = transposed(owner)
        self.handle: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        # A copy of the model has a copy of the hook, with values of its own.
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def hook(self) -> None:
        """Add to every output of the layer."""
        self.handle = self.owner.register_forward_hook(self._add)

    def unhook(self) -> None:
        """Stop adding."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None

    def reload(self) -> None:
        """Nothing to take over: a packed base does not change."""

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if self.resting:
            return y
        if len(self.region.shape) == 1:  # the bias
            delta = (self.theta - self.original.to(self.theta.dtype)).to(y.dtype)
            return y + y.new_zeros(self.region.shape).index_copy(0, self.region.flat(), delta)
        chosen, *part = self.local(0, "row" if self.transposed else "column")
        return product(y, args[0], self, chosen, (part[0], part[1]))


def dequantized(name: str, owner: nn.Module, leaf: str) -> Tensor:
    """Return a linear layer's weight or bias in floating point, unpacked if it is quantized.

    Raises:
        RequestError: the owner is no linear layer, or its weight is packed in a way that is not known here.
    """
    parameter: Tensor = getattr(owner, leaf)
    held = parameter.detach()
    unpack = getattr(owner, "dequantize", None)
    linear = is_linear(owner) or hasattr(owner, "in_features")
    if leaf not in ("weight", "bias") or not (linear or callable(unpack)):
        raise RequestError(
            f"{name} of a {type(owner).__name__} on the side path, a {type(parameter).__name__} of {held.dtype}",
            expected="a plain, contiguous floating-point parameter, or the weight or bias of a linear layer",
            do="load the base unquantized, or leave it out of the selection",
        )
    if held.dtype in FLOATS and held.dim() == (1 if leaf == "bias" else 2):
        return held
    if callable(unpack) and (unpacked := unpack()).dim() == 2 and leaf == "weight":
        found: Tensor = unpacked
        return found
    raise RequestError(
        f"{name}, packed as {held.dtype} in a {type(owner).__name__}",
        expected="a linear layer that can dequantize",
        do="load the base unquantized",
    )
