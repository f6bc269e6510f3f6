"""Live weights: frozen parameters whose chosen entries follow small trainable tensors.

A live weight is the same object, in the same place, with the same storage: only its class is swapped
(`W.__class__ = LiveWeight`), so ties, keys and version counters stay what they were. Its uses are seen through
`__torch_function__`: the operation runs on the plain frozen weight with its own kernel, and a tap on the
output adds the compact gradient. What was tried and what was measured: docs/decisions.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.compact.deferred import Deferred, after_pass, input_gradient, passing, whole
from neurograft.core.compact.gradients import Route, Side, route
from neurograft.core.errors import RunError
from neurograft.core.marks import Watched
from neurograft.core.region import Region

Plain = torch._C.DisableTorchFunctionSubclass


class Live:
    """The trainable side of one live weight.

    Args:
        name: the parameter's module name, for messages.
        weight: the frozen parameter.
        region: which of its entries move.
        allow_dense: accept a dense gradient where an operation is not known.
    """

    def __init__(self, name: str, weight: nn.Parameter, region: Region, *, allow_dense: bool = False) -> None:
        self.name, self.weight, self.allow_dense = name, weight, allow_dense
        self.region = region.to(weight.device)
        # Biases (also banks of them) and single tokens: their dense gradient is no larger than an activation row.
        self.vector = name.endswith("bias") or math.prod(region.shape[:-1]) == 1
        self.original = self.region.read(weight)
        master = self.original if weight.dtype in (torch.float32, torch.float64) else self.original.float()
        self.theta = nn.Parameter(master.clone())
        self.epoch = 0
        self.resting = False
        self.seen = weight._version
        self.routes: dict[tuple[int, Side], tuple[Route, int, int]] = {}
        self.rows: Lookup | None = None
        self.filters: Any = None  # of a convolution, see `convolutions.filters`

    def __reduce__(self) -> Any:
        raise RunError(
            f"the live weight {self.name} cannot be pickled; save the graft, or detach before saving the model"
        )

    def write(self) -> None:
        """Bring the weight up to date with theta, unless it rests; rewriting equal values is harmless."""
        if self.resting:
            return
        if self.theta.dtype not in (torch.float32, torch.float64):
            raise RunError(f"the trained values of {self.name} became {self.theta.dtype}; they must stay float32")
        with Plain():
            self.region.write_(self.weight, self.numbers())

    def stepped(self) -> None:
        """Follow an optimizer's step: at once, or after the backward pass under way.

        An optimizer that steps inside a backward pass (a hook on accumulated gradients) must not change the weight
        under the input gradients that the pass still has to compute from it.
        """
        self.epoch += 1
        if passing():
            after_pass(lambda: after_pass(self.write))  # behind all that the pass itself puts off
        else:
            self.write()

    def numbers(self) -> Tensor:
        """Return the numbers of the region that theta stands for: theta itself, or a function of it."""
        return self.theta.detach()

    def source(self) -> Tensor:
        """Return what stands for these numbers in the graph, shaped like them; its gradient ends in theta."""
        return self.theta

    @property
    def beside(self) -> bool:
        """Say whether the weight is left alone, so that every use has to add what theta differs from it."""
        return False

    def dense(self) -> Tensor:
        """Return the whole weight for an operation without a compact gradient; its dense gradient ends in theta."""
        found: Tensor = Alias.apply(self.weight, self.source(), self)
        return found

    def copied(self) -> Tensor:
        """Return a copy of the whole weight with the current values."""
        self.sync()
        with Plain():
            return self.weight.detach().clone()

    @property
    def moment(self) -> int:
        """Number that grows whenever the values are stepped or written in a way that can be seen.

        Always 0 in a compiled graph, which would be compiled anew for every other number.
        """
        return 0 if torch.compiler.is_compiling() else self.epoch + self.theta._version

    def may_be_dense(self, free: bool = False) -> bool:
        """Say whether a dense gradient of this weight is accepted, `free` if the operation needs none larger."""
        return free or self.vector or self.allow_dense

    def reload(self) -> None:
        """Take over what somebody else wrote into the weight (`load_state_dict`, an initialiser)."""
        with Plain():
            self.theta.data.copy_(self.region.read(self.weight))
        self.seen = self.weight._version

    def moved(self, device: torch.device) -> None:
        """Follow the weight to another device; the values stay float32 whatever the model is cast to."""
        self.theta.data = self.theta.data.to(device)
        self.region, self.original = self.region.to(device), self.original.to(device)
        self.routes.clear()
        self.rows = self.filters = None
        self.seen = self.weight._version

    def sync(self) -> None:
        """Before a use: take over foreign writes, then write theta. Never gated on theta's version counter,
        which fused optimizers and `.data` writes do not raise."""
        if self.resting:
            return
        if self.weight.requires_grad:
            raise RunError(
                f"{self.name} was unfrozen while its entries are trained compactly; keep requires_grad False on it"
            )
        if self.weight._version != self.seen and not self.resting:
            self.reload()
        self.write()

    def restore(self) -> None:
        """Put the original numbers back, bit for bit."""
        with Plain():
            self.region.write_(self.weight, self.original)

    def local(self, bank: int, side: Side) -> tuple[Route, int, int]:
        """Return the route inside matrix `bank`, and the range of theta's first axis that belongs to it."""
        key = (bank, side)
        if key not in self.routes:
            self.routes[key] = in_bank(self.region, bank, side)
        return self.routes[key]

    def looked_up(self) -> Lookup:
        """Return where the gradient of a lookup in this weight goes, prepared once."""
        if self.rows is None:
            _, rows, columns = self.region.matrix
            ids, layout = self.region.ids, self.region.layout
            touched, at = ids, None
            if layout == "all":
                touched = torch.arange(rows, device=ids.device)
            elif layout != "rows":
                flat = self.region.flat()
                touched, row = (flat // columns).unique(return_inverse=True)
                at = row * columns + flat % columns
            slots = torch.full((rows,), len(touched), device=ids.device)
            self.rows = Lookup(
                slots.index_copy_(0, touched, torch.arange(len(touched), device=ids.device)), len(touched), at
            )
        return self.rows


def in_bank(region: Region, bank: int, side: Side) -> tuple[Route, int, int]:
    """Return the route inside one matrix of a bank, and the range of the values' first axis that belongs to it."""
    local, lo, hi = of_bank(region, bank)
    return route(local, side, local.ids.device), lo, hi


def of_bank(region: Region, bank: int) -> tuple[Region, int, int]:
    """Return the entries inside one matrix of a bank, and the range of the values' first axis that belongs to it."""
    banks, rows, columns = region.matrix
    per = {"rows": rows, "cols": columns, "flat": rows * columns}.get(region.layout)
    lo, hi, ids = 0, region.values_shape[0], region.ids
    if banks > 1 and per is not None:
        edge = torch.tensor([bank * per, (bank + 1) * per], device=ids.device)
        lo, hi = torch.searchsorted(ids, edge).tolist()
        ids = ids[lo:hi] - bank * per
    elif banks > 1:
        lo, hi = bank, bank + 1
    shape = region.shape if banks == 1 else (rows, columns)
    return Region(shape, (1, rows, columns), region.layout, ids, region.block), lo, hi


@dataclass(frozen=True)
class Lookup:
    """Rows of a table with trained entries.

    Args:
        slots: for every row of the table, its number among the rows with trained entries, or `count`.
        count: how many rows have trained entries.
        at: where each value stands in the [count, C] gradient of these rows; None if the values are the rows.
    """

    slots: Tensor
    count: int
    at: Tensor | None


def handed(y: Tensor) -> Tensor:
    """Return y as a new tensor on the same storage that autograd does not call a view.

    Callers may change a fresh product in place (Falcon adds its bias so), which a view would forbid; nothing
    else holds y.
    """
    return torch.ops.aten._unsafe_view(y, y.shape)


class Tap(torch.autograd.Function):
    """An operation's output y, whose backward yields the gradient of theta.

    It is the identity on a y that leads to x in the graph by itself; or, given what the product multiplied x by,
    it stands for the whole product y = x @ inward.T + bias and yields the gradients of x and of the bias too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        theta: Tensor,
        chosen: Route,
        live: Live,
        inward: Tensor | None = None,
        bias: Tensor | None = None,
        late: bool = False,
    ) -> Tensor:
        kept = x if chosen.keep is None else x.index_select(-1, chosen.keep)
        ctx.save_for_backward(kept, inward)
        ctx.chosen, ctx.live, ctx.shape, ctx.dtype = chosen, live, theta.shape, theta.dtype
        ctx.epoch, ctx.late = live.moment, late
        return handed(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        check_epoch(ctx.live, ctx.epoch)
        (kept, inward), asked = ctx.saved_tensors, ctx.chosen.asked
        kept = kept.reshape(-1, kept.shape[-1])
        if isinstance(g, Deferred) and asked is not None and not any(ctx.needs_input_grad[:2]):
            found, g = ctx.chosen.thin(kept, g.at(asked).reshape(-1, len(asked))), None
        else:
            g = whole(g)
            found = ctx.chosen.gradient(kept, g.reshape(-1, g.shape[-1]))
        found = found.reshape(ctx.shape).to(ctx.dtype)
        if inward is None:
            return g, None, found, None, None, None, None, None
        bias = g.sum(tuple(range(g.dim() - 1))) if ctx.needs_input_grad[6] else None
        return None, input_gradient(g, inward, late=ctx.late), found, None, None, None, bias, None


class Alias(torch.autograd.Function):
    """The weight itself, with a dense gradient from which theta's entries are read."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, theta: Tensor, live: Live) -> Tensor:
        ctx.live, ctx.epoch, ctx.dtype = live, live.moment, theta.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        check_epoch(ctx.live, ctx.epoch)
        return None, ctx.live.region.read(g.contiguous()).to(ctx.dtype), None


def check_epoch(live: Live, epoch: int) -> None:
    """Refuse a backward pass through a weight that was rewritten after the forward pass, and second derivatives."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():  # in a backward pass: it is to be differentiated itself
        raise RunError(
            f"create_graph=True through the live weight {live.name}, whose second derivatives are not known here; "
            "leave it out of the selection, or train it with adapter='dense'"
        )
    if live.moment != epoch:
        raise RunError(
            f"the entries of {live.name} were stepped between this forward pass and its backward pass; "
            "run backward before the optimizer step"
        )


def alias(value: Any, func: Any, *, free: bool = False) -> Any:
    """Replace a live tensor by its dense alias where that is allowed; pass anything else through.

    Args:
        value: an argument of the operation.
        func: the operation.
        free: the operation's dense gradient is no larger than the gradient of its output.

    Raises:
        RunError: the weight is a matrix and a dense gradient was not accepted.
    """
    if isinstance(value, (list, tuple)) and any(isinstance(v, Watched) for v in value):
        return type(value)(alias(v, func, free=free) for v in value)
    if not isinstance(value, Watched):
        return value
    live = value.neurograft
    if not live.may_be_dense(free):
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", None) or str(func)
        raise RunError(
            f"{live.name} meets the operation {name}, whose compact gradient is not known here; "
            "pass allow_dense=True to accept a dense gradient of this weight, or leave it out of the selection"
        )
    dense = live.dense()
    shift = getattr(value, "shift", None)
    if shift is not None:
        view: Any = value
        start = None  # in a compiled graph a view begins where its weight does
        if not torch.compiler.is_compiling():
            start = dense.storage_offset() + view.storage_offset() + shift - live.weight.storage_offset()
        dense = dense.as_strided(view.shape, view.stride(), start).to(view.dtype)
    return dense
