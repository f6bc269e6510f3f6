"""Taps: reading, changing and differentiating the activations of units while a model runs.

    with watch(model, sites, reader): model(**batch)          reader(name, x)        x [tokens, n] or [tokens, n, w]
    with change(model, sites, fn): model(**batch)             fn(name, x) -> x       x [..., n] or [..., n, w]
    with gradients(model, sites, reader): loss.backward()     reader(name, x, g, rows)

Padding never reaches a reader. Everybody asserts on leaving that every tap fired and saw tokens: a hook that a fused
kernel or a compiled graph bypasses is an error, not a silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.asking import asking
from neurograft.core.errors import RequestError, RunError
from neurograft.core.prompts.passing import Pass, Positions, Seen
from neurograft.core.taps.board import Board, Guest
from neurograft.core.units import Site

Reader = Callable[[str, Tensor], None]
GradientReader = Callable[[str, Tensor, Tensor, Tensor], None]
Changer = Callable[[str, Tensor], Tensor | None]


@dataclass
class Watch:
    """What a block of watching has seen.

    Args:
        now: the model's current pass; `now.number` counts passes.
        fired: site name -> how often its tap fired.
        tokens: site name -> how many tokens it saw.
        seen: where the activations that are being read stand; only during a call of the reader.
    """

    now: Pass
    fired: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    seen: Seen | None = None
    kept: Tensor | None = None
    lost: str = ""

    def place(self) -> tuple[Tensor, Tensor]:
        """Return the batch row and the position of the tokens that are being read, int64 [tokens] each.

        Raises:
            RequestError: the tokens are those sent to an expert that does not say which they are.
        """
        if self.seen is None:
            raise RunError("place() was asked for outside of a reader")
        if self.lost:
            raise RequestError(
                f"activations at {self.lost!r}, an expert that does not tell whose tokens it got",
                expected="units of which every token's example is known",
                do="leave experts out (match=), or do not ask by example (over='data', pool='token')",
            )
        rows, at = (p.reshape(-1) for p in self.seen.place())
        if self.kept is None:
            return rows, at
        kept = self.kept.reshape(-1).cpu()
        return rows[kept], at[kept]


@contextmanager
def watch(
    model: nn.Module, sites: Mapping[str, Site], reader: Reader, *, mask: Positions | None = None
) -> Iterator[Watch]:
    """Call `reader(site name, x)` with the activations at every pass of the block, without gradients.

    Args:
        model: the root that will be called.
        sites: what to read; each needs a tap.
        reader: gets x [tokens, n] for units of one feature and [tokens, n, w] for wider ones, a view of the
            model's own tensor, to be read only; a fused expert gets the tokens routed to it.
        mask: which tokens: "all" (None), "last", "answer", "prompt", or a callable batch -> bool [B, T]; padding
            never counts.

    Raises:
        RequestError: a site without a tap, or of another model.
        RunError: a tap never fired or never saw a token.

    Example:
        >>> from neurograft.core.units import Tap
        >>> net, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
        >>> with watch(net, {"a": Site("a", "neuron", 3, tap=Tap("1"))}, lambda name, x: seen.append(x.shape)):
        ...     y = net(torch.ones(4, 2))
        >>> seen
        [torch.Size([4, 3])]
    """
    board = Board.of(model)
    found = Watch(board.now)

    def visit(name: str, x: Tensor, seen: Seen) -> None:
        kept = seen.mask(mask or "all")
        x = x.detach()
        if kept is not None and not bool(kept.all()):
            flat = x[kept]
        else:
            kept, flat = None, x.reshape(-1, *x.shape[len(seen.lead) :])
        found.fired[name] += 1
        found.tokens[name] += len(flat)
        if len(flat):
            found.seen, found.kept, found.lost = seen, kept, name if _lost(sites[name], seen) else ""
            with torch.no_grad():
                reader(name, flat)
            found.seen = None

    with _seated(board, Guest(sites, visit), found):
        yield found


@contextmanager
def change(model: nn.Module, sites: Mapping[str, Site], fn: Changer, *, key: str = "") -> Iterator[Watch]:
    """Let `fn(site name, x)` replace the activations at every pass of the block; differentiable.

    Args:
        model: the root that will be called.
        sites: what to change; each needs a tap.
        fn: gets x [..., n] or [..., n, w] (with batch and tokens in front, or the tokens of an expert) and returns
            the tensor to go on with, or None to leave it.
        key: order among several changes of one tensor; equal keys apply in order of arrival.

    Raises:
        RequestError: a site without a tap, or of another model.
        RunError: a tap never fired.

    Example:
        >>> from neurograft.core.units import Tap
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Identity())
        >>> with change(net, {"a": Site("a", "neuron", 3, tap=Tap("1"))}, lambda name, x: x * 0 + 1):
        ...     net(torch.ones(1, 2)).tolist()
        [[1.0, 1.0, 1.0]]
    """
    board = Board.of(model)
    found = Watch(board.now)

    def visit(name: str, x: Tensor, seen: Seen) -> Tensor | None:
        found.fired[name] += 1
        found.tokens[name] += x.shape[:-1].numel()
        found.seen = seen
        made = fn(name, x)
        found.seen = None
        return made

    with _seated(board, Guest(sites, visit, key=key, again=True), found):
        yield found


@contextmanager
def gradients(
    model: nn.Module, sites: Mapping[str, Site], reader: GradientReader, *, mask: Positions | None = None
) -> Iterator[Watch]:
    """Call `reader(site name, x, g, rows)` during every backward pass of the block.

    Every parameter is frozen for the length of the block, so no weight gradient is computed or held; the graph
    begins at the first tap. What was in `.grad` stays.

    Args:
        model: the root that will be called.
        sites: what to read; each needs a tap.
        reader: gets activations and the gradient of the scalar with respect to them, both [tokens, n] or
            [tokens, n, w], and the batch row of each token, int64 [tokens], -1 inside an expert that does not tell
            whose tokens it got; tokens outside of the mask have g = 0.
        mask: which tokens count, as for `watch`.

    Raises:
        RequestError: a site without a tap, or of another model.
        RunError: a tap never fired, or no backward pass came.
    """
    board = Board.of(model)
    found = Watch(board.now)
    anchor = torch.zeros((), requires_grad=True)

    def visit(name: str, x: Tensor, seen: Seen) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        kept, rows = seen.mask(mask or "all"), seen.place()[0].reshape(-1)
        rows = torch.full_like(rows, -1) if _lost(sites[name], seen) else rows
        wide = len(seen.lead)

        def tell(x: Tensor, g: Tensor) -> None:
            if kept is not None:
                g = g * kept.reshape(*kept.shape, *[1] * (g.dim() - wide)).to(g)
            found.fired[name] += 1
            found.tokens[name] += len(rows) if kept is None else int(kept.sum())
            reader(name, x.reshape(-1, *x.shape[wide:]), g.reshape(-1, *g.shape[wide:]), rows.to(g.device))

        return Meter.apply(x, anchor, tell)

    guest = Guest(sites, visit, key="\x7f", again=True)
    with asking(model), _seated(board, guest, found, "no backward pass reached it"):
        yield found


class Meter(torch.autograd.Function):
    """Identity that tells its input and the gradient at its output.

    The output is a copy, which the model may change in place; the input is kept anyway, so the copy is the only
    tensor that lives on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, tell: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tell = tell
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (x,) = grads, ctx.saved_tensors
        with torch.no_grad():
            ctx.tell(x, g)
        return g if ctx.needs_input_grad[0] else None, None, None


@contextmanager
def _seated(board: Board, guest: Guest, found: Watch, why: str = "") -> Iterator[None]:
    """Seat a guest for a block and check on a regular end that every tap did its work."""
    board.join(guest)
    before = board.now.number
    try:
        yield
    finally:
        board.leave(guest)
    silent = [n for n, s in guest.sites.items() if not found.fired[n] and (guest.fired[n] or not routed(s))]
    if silent:
        passes = board.now.number - before
        raise RunError(
            f"the tap of {silent[0]} never fired ({len(silent)} of {len(guest.sites)} sites, {passes} forward passes): "
            + (why or "the model was not called, or a compiled or fused kernel bypasses the module")
        )
    empty = [n for n in guest.sites if not found.tokens[n] and not routed(guest.sites[n])]
    if empty:
        raise RunError(f"the tap of {empty[0]} saw no token ({len(empty)} sites): every position was masked")


def _lost(site: Site, seen: Seen) -> bool:
    """Say whether tokens are some that were sent to an expert, and nobody knows which."""
    return routed(site) and seen.tokens is None and len(seen.lead) == 1


def routed(site: Site) -> bool:
    """Say whether a tap lies inside an expert, which may rightly see no token."""
    tap = site.tap
    return tap is not None and (tap.expert is not None or re.search(r"\bexperts\.\w*\d+\b", tap.module) is not None)
