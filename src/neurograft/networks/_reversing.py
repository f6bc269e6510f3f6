"""Decoder layers as reversible blocks: inputs are computed back from outputs, so that none is kept for training."""

from __future__ import annotations

import contextvars
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, RunError
from neurograft.core.seeds import derive
from neurograft.networks._routing import Routing

PARTS = (
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ("ln_1", "attn", "ln_2", "mlp"),
)


@dataclass
class Tape:
    """What the layers of one forward pass tell each other.

    Args:
        form: "standard" (queries, keys and values from the second half) or "coupled" (queries from the first).
        verify: check the inverse in every n-th forward pass; 0 for never.
        tolerance: how far a recovered number may be off, relative to the largest.
        iterations: of the fixed point, at most.
        passes: forward passes with gradients so far.
        stored: how often a layer kept its input because its inverse missed it.
        output: the layers' last output, to see that the next one gets it.
        halves: the two halves of an input, found by the layer above, for the one below.
    """

    form: str = "standard"
    verify: int = 1
    tolerance: float = 1e-6
    iterations: int = 100
    passes: int = 0
    stored: int = 0
    output: Tensor | None = None
    halves: tuple[Tensor, Tensor] | None = None


@dataclass
class Block:
    """One decoder layer whose hidden state is [X1, X2]: Y1 = X1 + F(X1, X2), Y2 = X2 + G(Y1).

    F is P_down Attn(LN(P_up .)), G is P_down FFN(LN(P_up .)), with the layer's own norms, attention and FFN.

    Args:
        layer: the layer.
        up: P_up, [d, d / 2].
        down: P_down, [d / 2, d].
        tape: of the model.
        bottom: whether it is the lowest layer.
        last: whether it is the top layer.
    """

    layer: nn.Module
    up: Tensor
    down: Tensor
    tape: Tape
    bottom: bool
    last: bool
    routing: Routing = field(init=False)
    seed: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        names = next((p for p in PARTS if all(hasattr(self.layer, n) for n in p)), None)
        if names is None:
            raise RequestError(
                f"a {type(self.layer).__name__} as a reversible block",
                expected="a decoder layer with two norms, attention and FFN, each norm before its branch",
                do="use a Llama-, Qwen-, Mixtral- or GPT-2-like decoder",
            )
        self.norm1, self.attend, self.norm2, self.feed = (getattr(self.layer, n) for n in names)
        self.known = inspect.signature(type(self.layer).forward)
        self.routing = Routing.of(self.feed)
        if self.tape.form == "coupled" and not all(hasattr(self.attend, n) for n in ("q_proj", "k_proj", "v_proj")):
            raise RequestError(
                f"the coupled form with a {type(self.attend).__name__}, whose q, k and v are one matrix",
                expected="separate q_proj, k_proj and v_proj",
                do="form='standard'",
            )

    def drawn(self) -> int | None:
        """Draw what dropout is seeded with in this pass, and again when inputs are computed back; None without."""
        self.seed = int(torch.randint(1 << 31, ()).item()) if _random(self.layer) else None
        return self.seed

    def first(self, x1: Tensor, x2: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return F."""
        coupled = self.tape.form == "coupled"
        seen = self.norm1(self._up(x1 if coupled else x2))
        with _seeded(self.seed, 0), _fed(self.attend, self.norm1(self._up(x2)) if coupled else None):
            out = self.attend(seen, **kwargs)
        return self._down(out[0] if isinstance(out, tuple) else out)

    def second(self, y1: Tensor) -> Tensor:
        """Return G."""
        with _seeded(self.seed, 1):
            out = self.feed(self.norm2(self._up(y1)))
        return self._down(out[0] if isinstance(out, tuple) else out)

    def _up(self, x: Tensor) -> Tensor:
        weight = self.norm1.weight
        return torch.nn.functional.linear(x, self.up.to(x)).to(weight.dtype if isinstance(weight, Tensor) else x.dtype)

    def _down(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return torch.nn.functional.linear(wide, self.down.to(wide))

    def forward(self, x1: Tensor, x2: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return Y1 and Y2."""
        y1 = x1 + self.first(x1, x2, kwargs)
        return y1, x2 + self.second(y1)

    def out(self, y: tuple[Tensor, Tensor]) -> Tensor:
        """Return the hidden state for the next layer, or from the top one in the model's dtype for its head."""
        return torch.cat(y, -1).to(self.norm1.weight.dtype) if self.last else torch.cat(y, -1)

    def inverse(self, y1: Tensor, y2: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return X1 and X2: one step in the standard form, in the coupled one a fixed point from X1 = Y1."""
        x2 = y2 - self.second(y1)
        if self.tape.form == "standard":
            return y1 - self.first(y1, x2, kwargs), x2
        x1, close = y1, 4 * torch.finfo(y1.dtype).eps
        for _ in range(self.tape.iterations):
            now = y1 - self.first(x1, x2, kwargs)
            step, x1 = float((now - x1).abs().max()), now
            if not math.isfinite(step) or step <= close * (1 + float(now.abs().max())):
                break
        return x1, x2

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the layer was called with beside the hidden state, for its attention."""
        bound = self.known.bind(self.layer, None, *args, **kwargs)
        found = dict(list(bound.arguments.items())[2:])
        more = found.pop("kwargs", {})
        if found.pop("encoder_hidden_states", None) is not None:
            raise RequestError("cross-attention in a reversible block", expected="a decoder alone", do="leave it out")
        found.pop("encoder_attention_mask", None)
        return {**found, **more}

    def misses(self, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], kwargs: Mapping[str, Any]) -> bool:
        """Say whether the inverse of y is something other than x; a small residual would not show that."""
        with self.routing.again():
            found = self.inverse(*y, kwargs)
        off = max(float((a - b).abs().max()) for a, b in zip(found, x))
        return not off <= self.tape.tolerance * (1 + max(float(h.abs().max()) for h in x))


class Reverse(torch.autograd.Function):
    """A block that keeps nothing for its backward pass, but for the top one's output and inputs it cannot recover.

    Its own parameters are among what it is given, so that their gradients are handed on as any other's: to hooks, to
    processes that share them, to `torch.autograd.grad`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, block: Block, kwargs: Mapping[str, Any], *own: nn.Parameter) -> Any:
        tape, x = block.tape, _halves(hidden)
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
            return block.out(block.forward(*_halves(hidden_states), given))
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


@contextmanager
def _fed(attend: nn.Module, other: Tensor | None) -> Iterator[None]:
    """Let keys and values be made of another input than the queries."""
    with ExitStack() as undo:
        for name in ("k_proj", "v_proj") if other is not None else ():
            hook: Callable[..., Any] = lambda module, args: (other, *args[1:])  # noqa: E731
            undo.callback(getattr(attend, name).register_forward_pre_hook(hook).remove)
        yield


def _halves(hidden: Tensor) -> tuple[Tensor, Tensor]:
    # The stream of halves stays float32 between the layers: sums rounded to bfloat16 could not be taken back.
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    first, second = wide.chunk(2, -1)
    return first.contiguous(), second.contiguous()


def _random(layer: nn.Module) -> bool:
    if not layer.training:
        return False
    rates = [m.p for m in layer.modules() if isinstance(m, nn.Dropout)]
    rates += [float(getattr(m, n, 0.0) or 0.0) for m in layer.modules() for n in ("attention_dropout", "jitter_noise")]
    return any(rates)


@contextmanager
def _seeded(seed: int | None, branch: int) -> Iterator[None]:
    """Let a branch's dropout draw the same numbers again, in whatever order the branches run."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, branch))
        yield
