"""Input gradients that are computed where they are read: in the lowest trained FFN, at the chosen neurons only.

The gradient of a product's input is a product as large as itself. In the lowest FFN that trains, it ends at taps that
read it at a few neurons. There it travels as a `Deferred`: two factors, and what elementwise operations do to their
product. A tap asks for its neurons, a thin product; whoever else looks at it (a hook, `retain_grad`, `autograd.grad`,
any other operation) gets the whole gradient; and what somebody still holds at the end of the pass is made whole then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neurograft.core.numerics.matmul import matmul

aten = torch.ops.aten
Change = tuple[Callable[..., Tensor], int, tuple[Any, ...]]  # function, place of the gradient, other arguments
ELEMENTWISE = {
    aten.mul.Tensor,
    aten.silu_backward.default,
    aten.gelu_backward.default,
    aten.sigmoid_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
}
FAR = 12  # functions between a product and the taps below it, at most


class Product:
    """g @ W, computed whole at most once.

    Args:
        g: [..., m], gradient of a product's output.
        weight: [m, n], as the product read it.
    """

    def __init__(self, g: Tensor, weight: Tensor) -> None:
        self.g, self.weight = g, weight
        self.found: Tensor | None = None
        self.users: list[weakref.ref[Deferred]] = []

    def whole(self) -> Tensor:
        """Return it, [..., n]."""
        if self.found is None:
            self.found = self._times(self.weight)
        return self.found

    def at(self, ids: Tensor) -> Tensor:
        """Return its columns `ids`, [..., k]."""
        return self._times(self.weight.index_select(1, ids))

    def _times(self, weight: Tensor) -> Tensor:
        flat = matmul(self.g.reshape(-1, self.g.shape[-1]), weight)
        return flat.view(*self.g.shape[:-1], weight.shape[1])

    def settle(self) -> None:
        """Make whole what is still held; the weight is about to change."""
        for user in self.users:
            held = user()
            if held is not None:
                held.whole()


class Deferred(Tensor):
    """A gradient that is known by its factors; to everybody but taps it is a plain tensor."""

    product: Product
    changes: tuple[Change, ...]
    made: Tensor | None

    @staticmethod
    def of(product: Product, changes: tuple[Change, ...] = ()) -> Deferred:
        """Return changes(g @ W), not computed."""
        g, weight = product.g, product.weight
        size = (*g.shape[:-1], weight.shape[1])
        found: Any = Tensor._make_wrapper_subclass(Deferred, size, dtype=g.dtype, device=g.device)
        found.product, found.changes, found.made, found.like = product, changes, None, (torch.Size(size), g.dtype)
        product.users.append(weakref.ref(found))
        deferred: Deferred = found
        return deferred

    def whole(self) -> Tensor:
        """Return the gradient."""
        if self.made is None:
            self.made = self._changed(self.product.whole(), lambda t: t)
            del self.product, self.changes
        return self.made

    def at(self, ids: Tensor) -> Tensor:
        """Return the gradient at the features `ids`, [..., k]."""
        if self.made is not None:
            return self.made.index_select(-1, ids)
        return self._changed(self.product.at(ids), lambda t: t.index_select(-1, ids))

    def _changed(self, found: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        for function, place, others in self.changes:
            rest = [part(t) if isinstance(t, Tensor) else t for t in others]
            found = function(*rest[:place], found, *rest[place:])
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run what Python asks for on the whole gradient."""
        return func(*whole(args), **whole(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Put an elementwise operation of the backward pass off; run any other on the whole gradient."""
        mine = [i for i, a in enumerate(args) if isinstance(a, Deferred)]
        if func in ELEMENTWISE and len(mine) == 1 and args[mine[0]].made is None:
            (place,) = mine
            this, others = args[place], (*args[:place], *args[place + 1 :])
            if all((t.shape, t.dtype) == this.like for t in others if isinstance(t, Tensor)):
                change = ((lambda *a: func(*a, **kwargs)) if kwargs else func, place, others)
                return Deferred.of(this.product, (*this.changes, change))
        return func(*whole(args), **whole(kwargs or {}))


def whole(value: Any) -> Any:
    """Return deferred gradients whole, also inside lists and dicts; anything else as it is."""
    if isinstance(value, Deferred):
        return value.whole()
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return type(value)(map(whole, value)) if type(value) in (list, tuple) else value


def input_gradient(g: Tensor, weight: Tensor, *, late: bool) -> Tensor:
    """Return the gradient of a product's input, g @ W: computed, or deferred until somebody reads it.

    Args:
        g: [..., m], gradient of the product's output.
        weight: [m, n].
        late: defer it.
    """
    product = Product(g, weight)
    if not late:
        return product.whole()
    after_pass(product.settle)
    return Deferred.of(product)


def passing() -> bool:
    """Say whether a backward pass is under way."""
    return torch._C._current_graph_task_id() >= 0


def after_pass(call: Callable[[], None]) -> None:
    """Call something at the end of the backward pass under way, in the order of asking."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def pays(x: Tensor, tap: type[torch.autograd.Function]) -> bool:
    """Say whether the gradient of x ends, through a few functions, at taps whose own inputs need none.

    Only the price hangs on the answer: a deferred gradient is right wherever it arrives.
    """
    left, ahead, name = FAR, [x.grad_fn], f"{tap.__name__}Backward"
    while ahead:
        node, left = ahead.pop(), left - 1
        if node is None or left < 0 or type(node).__name__ == "AccumulateGrad":
            return False
        below = node.next_functions
        if type(node).__name__ != name:
            ahead += [n for n, _ in below if n is not None]
        elif any(n is not None for n, _ in below[:2]):
            return False
    return True
