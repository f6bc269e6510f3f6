"""Linear layers whose weight is no plain parameter: quantized, offloaded or sharded. A hook adds to their output."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neurograft.core.compact.additions import product
from neurograft.core.compact.beside import Beside
from neurograft.core.errors import RequestError
from neurograft.core.linears import is_linear, transposed
from neurograft.core.region import Region

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def plain(weight: nn.Parameter) -> bool:
    """Say whether a parameter's numbers lie in memory as they are."""
    usual = type(weight) is nn.Parameter and weight.dtype in FLOATS
    return usual and weight.is_contiguous() and weight.device.type != "meta"


def packs(module: nn.Module) -> bool:
    """Say whether a layer holds packed or sharded weights, and has a kernel of its own for them and its bias."""
    return any(
        not (type(p) is nn.Parameter and p.dtype in FLOATS) for p in module._parameters.values() if p is not None
    )


class Packed(Beside):
    """The trainable side of a linear layer whose weight is no plain parameter.

    Args:
        name: the weight's name.
        owner: the layer: `nn.Linear`, GPT-2's `Conv1D`, or a quantized linear that dequantizes.
        leaf: the name of the weight, or of the bias, in the layer.
        region: its trained entries.
    """

    def __init__(self, name: str, owner: nn.Module, leaf: str, region: Region) -> None:
        super().__init__(name, nn.Parameter(unpacked(name, owner, leaf), requires_grad=False), region)
        self.weight, self.owner, self.leaf = getattr(owner, leaf), owner, leaf
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

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Put the unpacked weight, in the CPU's memory, in the place of the packed one for a moment."""
        held = self.owner._parameters[self.leaf]
        self.owner._parameters[self.leaf] = nn.Parameter(unpacked(self.name, self.owner, self.leaf).cpu(), False)
        try:
            yield
        finally:
            self.owner._parameters[self.leaf] = held

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if self.resting:
            return y
        if len(self.region.shape) == 1:  # the bias
            delta = (self.theta - self.original.to(self.theta.dtype)).to(y.dtype)
            return y + y.new_zeros(self.region.shape).index_copy(0, self.region.flat(), delta)
        chosen, *part = self.local(0, "row" if self.transposed else "column")
        return product(y, args[0], self, chosen, (part[0], part[1]))


def unpacked(name: str, owner: nn.Module, leaf: str) -> Tensor:
    """Return a linear layer's weight or bias in floating point: whole, in memory, dequantized.

    Every process has to ask for a sharded one at the same time.

    Raises:
        RequestError: the owner is no linear layer, or its weight is packed in a way that is not known here.
    """
    from accelerate.utils import align_module_device

    linear = is_linear(owner) or hasattr(owner, "in_features")
    with align_module_device(owner):  # what accelerate has offloaded is brought for the length of the block
        parameter: Tensor = getattr(owner, leaf)
        held = parameter.detach()
        found: Tensor | None = None
        if leaf in ("weight", "bias") and (linear or callable(getattr(owner, "dequantize", None))):
            found = held.full_tensor() if hasattr(held, "full_tensor") else held
            if leaf == "weight" and not _floats(found, 2):
                found = _dequantized(owner)
    if found is None or not _floats(found, 1 if leaf == "bias" else 2):
        raise RequestError(
            f"{name} of a {type(owner).__name__} on the side path, a {type(parameter).__name__} of {held.dtype} "
            f"on {held.device}",
            expected="a plain, contiguous floating-point parameter, or the weight or bias of a linear layer that can "
            "dequantize",
            do="load the base unquantized and in memory, or leave it out of the selection",
        )
    return found


def _floats(held: Tensor | None, dims: int) -> bool:
    usual = type(held) in (Tensor, nn.Parameter)
    return usual and held.dtype in FLOATS and held.dim() == dims and held.device.type != "meta"  # type: ignore[union-attr]


def _dequantized(owner: nn.Module) -> Tensor | None:
    unpack = getattr(owner, "dequantize", None)
    if callable(unpack):
        found: Tensor = unpack()
        return found
    weight: Any = owner.weight
    kind = type(weight)
    if kind.__module__.startswith("torchao."):
        found = weight.dequantize()
        return found
    if kind.__name__ == "Int8Params":  # bitsandbytes; its scales move to the layer at the first use
        state: Any = owner.state
        scale: Tensor = state.SCB if weight.SCB is None else weight.SCB
        return weight.data * (scale / 127)[:, None]
    if kind.__name__ == "Params4bit":
        from peft.utils.integrations import dequantize_bnb_weight

        return dequantize_bnb_weight(weight).detach()
    return None


def sharding(model: nn.Module, name: str, weight: Any) -> Any:
    """Return the group of processes over which FSDP2 shards a weight, None for one that is not sharded.

    Raises:
        RequestError: it is distributed otherwise: over several dimensions of processes, or by tensor parallelism.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return None
    from torch.distributed.fsdp import FSDPModule

    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    if mesh.ndim != 1 or not any(isinstance(module, FSDPModule) for module in above):
        raise RequestError(
            f"{name} on the side path, distributed over a mesh of {tuple(mesh.shape)} processes as {weight.placements}",
            expected="a weight that fully_shard shards over one dimension of processes",
            do="shard the model by fully_shard alone, or leave the weight out of the selection",
        )
    return mesh.get_group()


def resharded(model: nn.Module) -> None:
    """Bring the parameters of a sharded model back to their shards, where a forward pass has left them whole."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
