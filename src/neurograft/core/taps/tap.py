"""Taps: reading, changing and differentiating the activations of units while a model runs.

    with watch(model, sites, reader): model(**batch)          reader(name, x)        x [tokens, n] or [tokens, n, w]
    with change(model, sites, fn): model(**batch)             fn(name, x) -> x       x [..., n] or [..., n, w]
    with gradients(model, sites, reader): loss.backward()     reader(name, x, g, rows)

Padding never reaches a reader, nor do uses of a module elsewhere than at the tokens it stands at. Everybody asserts
on leaving that every tap fired and saw tokens: a hook that a fused kernel or a compiled graph bypasses is an error,
not a silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.asking import asking
from neurograft.core.prompts.passing import Positions, Seen
from neurograft.core.taps.board import Board, Guest
from neurograft.core.taps.watching import Watch, lost, seated
from neurograft.core.units import Site

Reader = Callable[[str, Tensor], None]
GradientReader = Callable[[str, Tensor, Tensor, Tensor], None]
Changer = Callable[[str, Tensor], Tensor | None]


def per_unit(x: Tensor) -> Tensor:
    """Return one number for each unit, [tokens, n]: activations as they are, of [tokens, n, w] the norms of features.

    Example:
        >>> per_unit(torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])).tolist()
        [[5.0, 1.0]]
    """
    return x if x.dim() == 2 else torch.linalg.vector_norm(x.float(), dim=-1)


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
        if seen.astray(name):
            return
        kept = seen.mask(mask or "all")
        x = x.detach()
        if kept is not None and not bool(kept.all()):
            flat = x[kept]
        else:
            kept, flat = None, x.reshape(-1, *x.shape[len(seen.lead) :])
        found.fired[name] += 1
        found.tokens[name] += len(flat)
        if len(flat):
            found.seen, found.kept, found.lost = seen, kept, name if lost(sites[name], seen) else ""
            with torch.no_grad():
                reader(name, flat)
            found.seen = None

    with seated(board, Guest(sites, visit), found):
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

    with seated(board, Guest(sites, visit, key=key, again=True), found):
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
            [tokens, n, w], and the batch row of each token, int64 [tokens], -1 where it is not told
            whose tokens those are, as inside some experts; tokens outside of the mask have g = 0.
        mask: which tokens count, as for `watch`.

    Raises:
        RequestError: a site without a tap, or of another model.
        RunError: a tap never fired, or no backward pass came.
    """
    board = Board.of(model)
    found = Watch(board.now)
    anchor = torch.zeros((), requires_grad=True)

    def visit(name: str, x: Tensor, seen: Seen) -> Tensor | None:
        if not torch.is_grad_enabled() or seen.astray(name):
            return None
        kept, rows = seen.mask(mask or "all"), seen.place()[0].reshape(-1)
        rows = torch.full_like(rows, -1) if lost(sites[name], seen) else rows
        wide = len(seen.lead)

        def tell(x: Tensor, g: Tensor) -> None:
            if kept is not None:
                g = g * kept.reshape(*kept.shape, *[1] * (g.dim() - wide)).to(g)
            found.fired[name] += 1
            found.tokens[name] += len(rows) if kept is None else int(kept.sum())
            reader(name, x.reshape(-1, *x.shape[wide:]), g.reshape(-1, *g.shape[wide:]), rows.to(g.device))

        return Meter.apply(x, anchor, tell)

    guest = Guest(sites, visit, key="\x7f", again=True)
    with asking(model), seated(board, guest, found, "no backward pass reached it"):
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
