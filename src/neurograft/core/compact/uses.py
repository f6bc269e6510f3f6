"""Which operations a live weight may meet, and how each gets its compact gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.compact import convolutions, lookups, products
from neurograft.core.compact.live import Live, Plain, alias
from neurograft.core.marks import Watched

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class LiveWeight(Watched, nn.Parameter):
    """A frozen parameter with some live entries; see `core.compact.live.Live`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and attach the compact gradients."""
        return dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        # A copy of a live model is a plain model with the current values.
        made = nn.Parameter(self.neurograft.copied(), requires_grad=False)
        memo[id(self)] = made
        return made


class LiveView(Watched, Tensor):
    """A view or a cast of a live weight that still knows which entries it shows.

    `shift` is what to add to its storage offset to get the place of its first entry in the weight's storage.
    Compilers cannot ask for the offset, and follow only views that begin where the weight does.
    """

    shift: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and attach the compact gradients."""
        return dispatch(func, args, kwargs or {})


def tag(live: Live) -> None:
    """Make a weight live."""
    live.weight.__class__ = LiveWeight
    live.weight.neurograft = live  # type: ignore[attr-defined]


def untag(live: Live) -> None:
    """Make a weight plain again."""
    with Plain():
        live.weight.__class__ = nn.Parameter
        del live.weight.neurograft  # type: ignore[attr-defined]


def lives_in(model: nn.Module) -> Iterator[Live]:
    """Yield the live weights of a model."""
    for parameter in model.parameters():
        if isinstance(parameter, LiveWeight):
            yield parameter.neurograft


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func` on plain weights and attach the gradients of the live ones among its arguments."""
    with Plain():
        handler = USES.get(func) or (products.grouped if func is _fallback() else None)
        if handler is not None:
            sync(args, kwargs)
            out = handler(func, args, kwargs) if _concerned(func, args, kwargs) else func(*args, **kwargs)
        elif func in VIEWS and args and isinstance(args[0], Watched):
            out = _view(func, args, kwargs)
        else:
            out = NotImplemented
        return _other(func, args, kwargs) if out is NotImplemented else out


def _fallback() -> Any:
    """Return transformers' own grouped product, which it takes where torch's does not compile; None without it."""
    return getattr(torch.ops.transformers, "grouped_mm_fallback", None)


def watched(args: Any, kwargs: dict[str, Any]) -> Iterable[Watched]:
    """Yield the live tensors among an operation's arguments, also those inside lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Watched):
            yield value
        elif isinstance(value, (list, tuple)):  # nn.LSTM hands its weights over in a list
            yield from (v for v in value if isinstance(v, Watched))


def _concerned(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether the weights' own numbers are not all that an operation needs: gradients, or what stands beside."""
    if torch.is_grad_enabled():
        return True
    # A kernel's own call comes from a backward pass that a dispatch mode watches: what is added has its own.
    return not isinstance(func, torch._ops.OpOverload) and any(w.neurograft.beside for w in watched(args, kwargs))


def sync(args: Any, kwargs: dict[str, Any]) -> None:
    """Bring every live weight among the arguments up to date; compiled graphs rely on the write after a step."""
    if not torch.compiler.is_compiling():
        for value in watched(args, kwargs):
            value.neurograft.sync()


def _view(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source: Any = args[0]
    if func in FLIPS and source.dim() == 2:
        func, args = torch.transpose, (source, 0, 1)  # compilers cannot mark what a property returns
    out = func(*args, **kwargs)
    copied = isinstance(out, Tensor) and out is not source and _copies(func, out, args)
    if copied:
        sync(args, kwargs)
        out = func(*args, **kwargs)
        if not _concerned(func, args, kwargs):
            return out
        if func is _T.__getitem__:
            return lookups.gathered(out, source, args[1])
    if torch.compiler.is_compiling() and func not in STILL:
        return NotImplemented
    if torch.compiler.is_compiling() and func in CASTS and out.dtype == source.dtype:
        return source  # compilers would take a cast that casts nothing for a plain tensor
    found = [_follow(o, source, copied) for o in (out if isinstance(out, (tuple, list)) else (out,))]
    if any(o is None for o in found):
        return NotImplemented
    return tuple(found) if isinstance(out, (tuple, list)) else found[0]


def _copies(func: Callable[..., Any], out: Tensor, args: tuple[Any, ...]) -> bool:
    """Say whether `out` has a storage of its own; compilers cannot ask the tensor."""
    if torch.compiler.is_compiling():
        return func in CASTS or (func is _T.__getitem__ and isinstance(args[1], Tensor))
    return not out._is_view()


def _follow(out: Tensor, source: Any, copied: bool) -> Any:
    """Return `out` as a view that knows its entries, or None if it holds other numbers than the source's."""
    if out is source:
        return out
    shift = getattr(source, "shift", 0)
    if copied and (out.shape != source.shape or out.stride() != source.stride()):
        return None
    if copied and not torch.compiler.is_compiling():
        shift = shift + source.storage_offset() - out.storage_offset()  # a cast: same entries, new storage
    made = out.as_subclass(LiveView)
    made.neurograft, made.shift = source.neurograft, shift
    return made


def _other(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that has no compact gradient here: harmless ones as they are, others on a dense alias."""
    if func in HARMLESS:
        if func in READS:
            sync(args, kwargs)
        return func(*args, **kwargs)
    if func in ASKS or (func in WRITES and isinstance(args[0], Watched)):
        return func(*args, **kwargs)  # a write into the weight itself: `Live.sync` takes it over
    sync(args, kwargs)
    if not _concerned(func, args, kwargs):
        return func(*args, **kwargs)
    free = func in BROADCAST
    if func not in WRITES and not all(w.neurograft.may_be_dense(free) for w in watched(args, kwargs)):
        out = func(*args, **kwargs)
        tensors = out if isinstance(out, (tuple, list)) else (out,)
        if not any(isinstance(o, Tensor) and o.is_floating_point() for o in tensors):
            return out  # a comparison
    dense = [alias(a, func, free=free) for a in args]  # and run once only: batch norms count, dropout draws
    return func(*dense, **{k: alias(v, func) for k, v in kwargs.items()})


_T: Any = Tensor
USES: dict[Any, Handler] = {
    F.linear: products.linear,
    torch.addmm: products.addmm, _T.addmm: products.addmm,
    torch.matmul: products.matmul, _T.matmul: products.matmul, _T.__matmul__: products.matmul,
    torch.mm: products.matmul, _T.mm: products.matmul,
    _T.__rmatmul__: products.rmatmul,
    torch._grouped_mm: products.grouped, F.grouped_mm: products.grouped,
    F.embedding: lookups.embedding,
    F.conv1d: convolutions.conv, F.conv2d: convolutions.conv, F.conv3d: convolutions.conv,
    torch.conv1d: convolutions.conv, torch.conv2d: convolutions.conv, torch.conv3d: convolutions.conv,
}  # fmt: skip

CASTS = frozenset({
    _T.to, _T.float, _T.half, _T.bfloat16, _T.double, _T.type_as, _T.cpu, _T.cuda, torch.clone, _T.clone, _T.contiguous,
})  # fmt: skip
FLIPS = frozenset({_T.T.__get__, _T.mT.__get__})
STILL = CASTS | FLIPS | frozenset({  # views that begin where their source does
    torch.transpose, _T.transpose, torch.t, _T.t, torch.permute, _T.permute,
    torch.squeeze, _T.squeeze, torch.unsqueeze, _T.unsqueeze, _T.view,
})  # fmt: skip
VIEWS = STILL | frozenset({
    _T.__getitem__, torch.select, _T.select, torch.narrow, _T.narrow, torch.chunk, _T.chunk, torch.split, _T.split,
    torch.unbind, _T.unbind,
})  # fmt: skip

# Their gradient by the weight is a sum over the gradient of their output: no larger than an activation.
BROADCAST = frozenset({
    torch.add, _T.add, _T.__add__, _T.__radd__, torch.sub, _T.sub, _T.__sub__, torch.rsub, _T.__rsub__,
    torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.div, _T.div, _T.__truediv__, _T.add_, _T.__iadd__,
})  # fmt: skip

READS = frozenset({_T.detach, torch.detach, _T.data.__get__, _T.numpy})
HARMLESS = READS | frozenset({
    _T.data.__set__, _T.grad.__get__, _T.grad.__set__, _T.grad.__delete__, _T.requires_grad.__set__, _T.requires_grad_,
    _T.__deepcopy__, _T.__reduce_ex__, _T.__repr__, _T.as_subclass,
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    _T.new_zeros, _T.new_ones, _T.new_empty, _T.new_full, _T.new_tensor,
})  # fmt: skip

# Questions that a weight's numbers do not answer: attributes but for those that are views, `is_contiguous` and so on.
ASKS = frozenset(
    getattr(_T, n).__get__
    for n in dir(_T)
    if type(getattr(_T, n)) is type(_T.shape) and n not in ("T", "H", "mT", "mH", "real", "imag")
) | frozenset(
    getattr(_T, n) for n in dir(_T) if n.startswith(("is_", "_is_", "has_", "_has_")) and callable(getattr(_T, n))
) - {_T.is_nonzero} | frozenset({
    _T.size, _T.dim, _T.stride, _T.numel, _T.nelement, _T.element_size, _T.storage_offset, _T.data_ptr, _T.get_device,
    _T.untyped_storage, _T.__len__, torch.numel, torch.is_floating_point, torch.is_complex,
})  # fmt: skip

# Operations that change their first argument: `add_`, `__iadd__`, `__setitem__`.
WRITES = frozenset(
    getattr(_T, n)
    for n in dir(_T)
    if n == "__setitem__" or (n.endswith("_") and not n.endswith("__")) or (n[:3] == "__i" and "__" + n[3:] in dir(_T))
) - {_T.requires_grad_}
