"""The side path: y += x @ (values - base).T beside a linear layer that is packed or sharded, and on its bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.compact.gradients import sampled_product
from neurograft.core.compact.mount import Mount
from neurograft.core.compact.values import register_values, unregister_values
from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import Slice
from neurograft.core.region import Region


class SideMount(Mount):
    """Values trained beside frozen linear layers.

    The trainable tensor of a weight holds values, as on the in-place route, so that weight decay means the
    same; the module adds what they differ from the base.
    """

    def __init__(
        self, model: nn.Module, regions: Mapping[str, Region], *, new: Iterable[str] | Mapping[str, int] = ()
    ) -> None:
        super().__init__(model, new=new)
        self.sides: dict[str, Side] = {}
        try:
            for name, region in regions.items():
                if name not in self.whole():
                    self.sides[name] = self._side(name, region)
            register_values(model, list(self.sides.values()))
        except BaseException:
            for side in self.sides.values():
                side.handle.remove()
            self.release()
            raise

    def _side(self, name: str, region: Region) -> Side:
        owners = {self.model.get_submodule(n.rpartition(".")[0]) for n in (name, *self.found.tied(name))}
        if len(owners) > 1:
            raise RequestError(
                f"{name} on the side path, which is tied with {', '.join(self.found.tied(name))}",
                expected="a weight with one use",
                do="use route='in-place', or tied='untie'",
            )
        return Side(name, owners.pop(), name.rpartition(".")[2], region)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the values by the names of the weights they belong to."""
        return {name: side.theta for name, side in self.sides.items()}

    def deltas(self) -> dict[str, Slice]:
        """Return the trained values."""
        return {n: Slice(s.region.to("cpu"), s.theta.detach().cpu().clone()) for n, s in self.sides.items()}

    def rest(self) -> Callable[[], None]:
        """Leave the side paths out for a moment."""
        for side in self.sides.values():
            side.resting = True

        def ended() -> None:
            for side in self.sides.values():
                side.resting = False

        return ended

    def unmount(self) -> None:
        """Take the hooks and the registered tensors off."""
        for side in self.sides.values():
            side.handle.remove()
        unregister_values(self.model)


class Side:
    """One linear layer with its side path.

    Args:
        name: the weight's name.
        owner: the layer: `nn.Linear`, GPT-2's `Conv1D`, or a quantized linear that dequantizes.
        leaf: the name of the weight, or of the bias, in the layer.
        region: its trained entries.
    """

    def __init__(self, name: str, owner: nn.Module, leaf: str, region: Region) -> None:
        weight = dequantized(name, owner, leaf)
        region = region.flattened()[0] if region.layout == "block" else region
        self.name, self.owner, self.transposed = name, owner, type(owner).__name__ == "Conv1D"
        self.region = region.to(weight.device)
        original = self.region.read(weight)
        self.base = original if original.dtype == torch.float64 else original.float()
        self.theta = nn.Parameter(self.base.clone())
        self.resting = False
        self.handle = owner.register_forward_hook(self._add)

    def moved(self, device: torch.device) -> None:
        """Follow the layer to another device."""
        self.theta.data, self.base = self.theta.data.to(device), self.base.to(device)
        self.region = self.region.to(device)

    def write(self) -> None:
        """Nothing to write: the base's weight is left alone."""

    def reload(self) -> None:
        """Nothing to take over: what was loaded is the base."""

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        if self.resting:
            return y
        x = args[0]
        delta = (self.theta - self.base).to(x.dtype)
        ids, layout = self.region.ids, self.region.layout
        if delta.dim() == 1 and len(self.region.shape) == 1:  # of the bias
            return y + delta.to(y.dtype) if layout == "all" else y.index_add(-1, ids, spread(delta.to(y.dtype), y))
        if layout == "all":
            return y + (x @ (delta if self.transposed else delta.t())).to(y.dtype)
        if layout == "flat":
            return y + _Sparse.apply(x, delta, self.region, self.transposed).to(y.dtype)
        if (layout == "rows") != self.transposed:
            return y.index_add(-1, ids, (x @ delta.t()).to(y.dtype))
        return y + (x.index_select(-1, ids) @ delta).to(y.dtype)


def spread(values: Tensor, y: Tensor) -> Tensor:
    """Return [k] as [..., k] over the positions of y."""
    return values.expand(*y.shape[:-1], len(values))


class _Sparse(torch.autograd.Function):
    """x @ S.T (or x @ S for a transposed weight) for a matrix S with few entries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, region: Region, transposed: bool) -> Tensor:
        _, rows, columns = region.matrix
        r, c = region.ids // columns, region.ids % columns
        ctx.save_for_backward(x, delta)
        ctx.index, ctx.transposed, ctx.size = (r, c), transposed, (rows, columns)
        work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        matrix = torch.sparse_coo_tensor(torch.stack([r, c]), delta.to(work), (rows, columns), is_coalesced=True)
        flat = x.reshape(-1, x.shape[-1]).to(work)
        out = torch.sparse.mm(matrix.t() if transposed else matrix, flat.t()).t()
        return out.reshape(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (x, delta), (r, c) = grads, ctx.saved_tensors, ctx.index
        rows, _ = ctx.size
        work = g.dtype if g.dtype in (torch.float32, torch.float64) else torch.float32
        x2, g2 = x.reshape(-1, x.shape[-1]).to(work), g.reshape(-1, g.shape[-1]).to(work)
        crow = torch.cat([r.new_zeros(1), torch.bincount(r, minlength=rows).cumsum(0)])
        found = sampled_product(x2, g2, crow, c) if ctx.transposed else sampled_product(g2, x2, crow, c)
        matrix = torch.sparse_coo_tensor(torch.stack([r, c]), delta.to(work), ctx.size, is_coalesced=True)
        back = torch.sparse.mm(matrix if ctx.transposed else matrix.t(), g2.t()).t()
        return back.reshape(x.shape).to(g.dtype), found.to(delta.dtype), None, None


def dequantized(name: str, owner: nn.Module, leaf: str) -> Tensor:
    """Return a linear layer's weight or bias in floating point, unpacked if it is quantized.

    Raises:
        RequestError: the owner is no linear layer, or its weight is packed in a way that is not known here.
    """
    held = getattr(owner, leaf).detach()
    unpack = getattr(owner, "dequantize", None)
    linear = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D" or hasattr(owner, "in_features")
    if not (linear or callable(unpack)):
        raise RequestError(
            f"{name} of a {type(owner).__name__} on the side path",
            expected="weights and biases of linear layers",
            do="use route='in-place', or leave it out of the selection",
        )
    if held.is_floating_point() and held.dim() == (1 if leaf == "bias" else 2):
        return held
    if callable(unpack):
        unpacked: Tensor = unpack()
        return unpacked
    raise RequestError(
        f"{name}, packed as {held.dtype} in a {type(owner).__name__}",
        expected="a linear layer that can dequantize",
        do="load the base unquantized",
    )
