"""The main directions of what a layer passes on are taken out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.intervene import Intervention
from neurograft.core.numerics.linalg import principal
from neurograft.core.selection import Selection
from neurograft.core.taps.look import look
from neurograft.core.taps.tap import watch


@method(paper="spectral-layers", kinds={"layer"}, needs={"batches", "taps"})
def remove_components(
    context: Context, where: Selection, *, numbers: Sequence[int] = (0,), positions: str = "last"
) -> Graft:
    """Subtract the projections on some principal components of a layer's output: x - V^T V x.

    The components are those of the outputs at the same positions over the batches, centred.

    Args:
        context: model, batches of prompts.
        where: layers tapped at the residual stream.
        numbers: which components, 0 the strongest.
        positions: where they are taken out: "last" of the prompt, "generated", "all".

    Returns:
        A graft of operations.

    Raises:
        RequestError: no data, layers without a tap, or fewer components than asked for.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> net = pico("llama")
        >>> layers = sites(net, "layer", at="residual")
        >>> batches = [pico_batch(net, seed=i) for i in range(4)]
        >>> low = Selection.of(layers, {next(iter(layers)): [0]})
        >>> len(remove_components(Context(net, layers, batches), low).operations)
        1
    """
    chosen = {n: where.sites[n] for n, ids in where.ids.items() if len(ids)}
    if not context.batches or not chosen or not numbers:
        raise RequestError(
            f"{len(numbers)} components of {len(chosen)} layers over {len(context.batches)} batches",
            expected="some of each",
            do="give data, layers, and numbers",
        )
    kept: dict[str, list[Tensor]] = {name: [] for name in chosen}

    def reader(name: str, x: Tensor) -> None:
        kept[name].append(x.reshape(len(x), -1).double().cpu())

    seen = positions if positions in ("all", "last", "prompt", "answer") else "last"
    with watch(context.model, chosen, reader, mask=seen), torch.no_grad():
        for batch in context.batches:
            look(context.model, batch)
    operations = []
    for name, site in chosen.items():
        directions, _ = principal(torch.cat(kept[name]), max(numbers) + 1)
        if len(directions) <= max(numbers):
            raise RequestError(
                f"component {max(numbers)} of {name}, which has {len(directions)}",
                expected=f"numbers below {len(directions)}",
                do="give more prompts, or lower numbers",
            )
        value = directions[list(numbers)].float()
        operations.append(Intervention(site, where.ids[name], "remove", value, positions))
    card = {"edit": "remove_components", "numbers": list(numbers), "positions": positions}
    return Graft.made(context.model, {}, operations=tuple(operations), card=card)
