"""A model as it would be with noise added to its parameters, which are never written.

Adding noise in place and subtracting it again does not undo in floating point, and keeping the originals is a copy
of the model. Here every use of a parameter is seen by a `TorchFunctionMode` and gets shifted numbers made for that
use, a chunk at a time in linear layers and lookups, so the base stays bit for bit what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from neurograft.core.numerics.noise import Stream

# Questions about a parameter that its numbers do not answer.
PLAIN = {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "data_ptr", "element_size", "__len__"}
PLAIN |= {"untyped_storage", "storage_offset", "get_device", "requires_grad_", "__hash__", "nelement"}


class Shift(TorchFunctionMode):
    """Every operation inside the block sees parameters plus the sum of scale * z(seed); no gradients.

    Args:
        parameters: name -> parameter; the name names its noise.
        terms: (seed, scale).
        grain: numbers drawn at a time.

    `reached` holds the names of the parameters that were used.

    Example:
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> before = net.weight.detach().clone()
        >>> with torch.no_grad(), Shift({"weight": net.weight}, [(3, 0.5)], grain=65536) as seen:
        ...     there = net(torch.eye(2)).t()
        >>> z = Stream("weight", (2, 2), 65536).draw(3, 0, 4, torch.device("cpu")).view(2, 2)
        >>> bool(torch.allclose(there, before + 0.5 * z)), bool((net.weight == before).all()), seen.reached
        (True, True, {'weight'})
    """

    def __init__(self, parameters: Mapping[str, Tensor], terms: Sequence[tuple[int, float]], *, grain: int) -> None:
        super().__init__()
        self.terms, self.reached = list(terms), set[str]()
        self.held = {id(p): (p, Stream(n, tuple(p.shape), grain)) for n, p in parameters.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation on shifted numbers."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        asked = name in PLAIN or (name == "type" and len(args) + len(kwargs) == 1)
        if asked or not self._any((args, kwargs)):
            return func(*args, **kwargs)
        if name == "__get__" and not isinstance(func(*args, **kwargs), Tensor):
            return func(*args, **kwargs)
        if func is F.linear and _named(args, kwargs, 1, "weight") is not None:
            return self._linear(*args, **kwargs)
        if func is F.embedding and len(args) <= 3 and kwargs.get("max_norm") is None:
            return self._lookup(*args, **kwargs)
        return func(*self._all(args), **self._all(kwargs))

    def _any(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return id(value) in self.held
        if isinstance(value, (list, tuple)):
            return any(self._any(v) for v in value)
        return isinstance(value, dict) and any(self._any(v) for v in value.values())

    def _all(self, value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in self.held:
            return self._whole(value)
        if type(value) in (list, tuple):
            return type(value)(self._all(v) for v in value)
        return {k: self._all(v) for k, v in value.items()} if type(value) is dict else value

    def _whole(self, parameter: Tensor) -> Tensor:
        _, stream = self.held[id(parameter)]
        self.reached.add(stream.name)
        flat = parameter.detach().reshape(-1)  # a copy where it lies in another order, as convolutions may
        found = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        for chunk, lo, hi in stream.chunks():
            found.view(-1)[lo:hi] = stream.moved(flat, chunk, lo, hi, self.terms)
        return found

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply a chunk of rows at a time."""
        bias, input = self._all(bias), self._all(input)
        if id(weight) not in self.held:
            return F.linear(input, weight, bias)
        _, stream = self.held[id(weight)]
        self.reached.add(stream.name)
        flat, width, found = weight.detach().reshape(-1), stream.width, None
        for chunk, lo, hi in stream.chunks():
            rows = slice(lo // width, hi // width)
            here = stream.moved(flat, chunk, lo, hi, self.terms).to(weight.dtype).view(-1, width)
            part = F.linear(input, here, None if bias is None else bias[rows])
            if hi - lo == flat.numel():
                return part
            if found is None:
                found = part.new_empty(*part.shape[:-1], weight.shape[0])
            found[..., rows] = part
        assert found is not None
        return found

    def _lookup(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Draw only the chunks in which a row is looked up."""
        _, stream = self.held[id(weight)]
        self.reached.add(stream.name)
        found = F.embedding(input, weight, *args, **kwargs)
        flat, out, ids = weight.detach().reshape(-1), found.view(-1, weight.shape[-1]), input.reshape(-1)
        for chunk in (ids // stream.rows).unique().tolist():
            lo = chunk * stream.rows * stream.width
            hi = min(lo + stream.rows * stream.width, flat.numel())
            rows = stream.moved(flat, chunk, lo, hi, self.terms).to(weight.dtype).view(-1, stream.width)
            mine = (ids // stream.rows == chunk).nonzero().reshape(-1)
            out[mine] = rows[ids[mine] - chunk * stream.rows]
        return found


def _named(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)
