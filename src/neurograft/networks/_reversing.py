"""Reversible blocks in training: inputs are computed back from outputs, so that none is kept."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RunError
from neurograft.networks._coupling import Block, in_two


class Reverse(torch.autograd.Function):
    """A block that keeps nothing for its backward pass, but for the top one's output and inputs it cannot recover.

    Its own parameters are among what it is given, so that their gradients are handed on as any other's: to hooks, to
    processes that share them, to `torch.autograd.grad`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, block: Block, kwargs: Mapping[str, Any], *own: nn.Parameter) -> Any:
        tape, x = block.tape, in_two(hidden)
        ctx.block, ctx.kwargs, ctx.dtype, ctx.routed, ctx.own = block, kwargs, hidden.dtype, None, own
        device = hidden.device.type
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.seed = block.drawn()
        with block.routing.noted() as ctx.routed, block.routing.heard() as logits:
            y = block.forward(*x, kwargs)
        check = tape.verify and (tape.passes - 1) % tape.verify == 0
        # In a context of its own, so that what transformers records of a pass is not recorded twice.
        ctx.stored = bool(check) and contextvars.Context().run(block.misses, x, y, kwargs)
        tape.stored += ctx.stored
        ctx.save_for_backward(*(x if ctx.stored else ()), *(y if block.last else ()))
        ctx.set_materialize_grads(False)
        # The very tensors that transformers has recorded: as outputs they carry the gradient of a router's own loss.
        return (block.out(y), *logits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        block, saved = ctx.block, list(ctx.saved_tensors)
        tape, kwargs = block.tape, ctx.kwargs
        kept = (saved.pop(0), saved.pop(0)) if ctx.stored else None
        y = tuple(saved) if block.last else tape.halves
        if y is None:
            raise RunError("a second backward pass through reversible blocks; call backward once for each forward pass")
        device, dtype, on = ctx.cast
        block.seed = ctx.seed
        # Without the cache: a weight cast while nothing was recorded would be taken for one that was.
        with block.routing.replayed(ctx.routed), torch.autocast(device, dtype, enabled=on, cache_enabled=False):
            with torch.no_grad():
                x = kept or block.inverse(*y, kwargs)
            with torch.enable_grad(), block.routing.heard() as logits:
                x1, x2 = (h.detach().requires_grad_() for h in x)
                found = block.forward(x1, x2, kwargs)
        upper, read = grads[0], [(one, g) for one, g in zip(logits, grads[1:]) if g is not None]
        wanted = [torch.zeros_like(h) for h in found] if upper is None else upper.to(found[0].dtype).chunk(2, -1)
        pulled = torch.autograd.grad(
            (*found, *(one for one, _ in read)),
            (x1, x2, *ctx.own),
            (*wanted, *(g for _, g in read)),
            allow_unused=True,
        )
        tape.halves = None if block.bottom else (x1.detach(), x2.detach())
        below = [torch.zeros_like(h) if g is None else g for h, g in zip((x1, x2), pulled)]
        return (torch.cat(below, -1).to(ctx.dtype), None, None, *pulled[2:])


class Wrapped:
    """What stands in the place of a layer's `forward`."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer as a reversible block."""
        block, tape = self.block, self.block.tape
        given = block.arguments(args, kwargs)
        if not torch.is_grad_enabled():
            block.drawn()
            return block.out(block.forward(*in_two(hidden_states), given))
        # A cache would be filled twice, and keep what the blocks are there not to keep.
        given |= {k: v for k, v in (("past_key_values", None), ("use_cache", False)) if k in given}
        if block.bottom:
            tape.passes, tape.halves = tape.passes + 1, None
        elif hidden_states is not tape.output:
            raise RunError("something between two reversible blocks changed the hidden state; it cannot be recovered")
        own = dict.fromkeys(p for p in (*block.layer.parameters(), block.up, block.down) if p.requires_grad)
        found: Tensor = Reverse.apply(hidden_states, block, given, *own)[0]
        tape.output = None if block.last else found
        return found

    def __deepcopy__(self, memo: Any) -> Any:
        raise RunError("a copy of a model with reversible blocks; copy it before they are put in")
