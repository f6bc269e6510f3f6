"""A decoder layer as a reversible block: its two halves, what comes out, and the inputs computed back from that."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.seeds import seeded
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


@contextmanager
def _fed(attend: nn.Module, other: Tensor | None) -> Iterator[None]:
    """Let keys and values be made of another input than the queries."""
    with ExitStack() as undo:
        for name in ("k_proj", "v_proj") if other is not None else ():
            hook: Callable[..., Any] = lambda module, args: (other, *args[1:])  # noqa: E731
            undo.callback(getattr(attend, name).register_forward_pre_hook(hook).remove)
        yield


def in_two(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two halves of a hidden state, in float32 at least."""
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
    with seeded(seed, branch):
        yield
