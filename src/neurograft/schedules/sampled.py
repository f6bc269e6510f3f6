"""A few layers at a time, drawn anew every so many steps; the ends of the model are always awake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from neurograft.anatomy.depth import Depths
from neurograft.core.card import method
from neurograft.core.context import Phase
from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator


@method(
    paper="lisa",
    departs="Sleeping layers lose their moments (moments='drop'), as the paper's memory claim needs; the maintained "
    "implementation only toggles requires_grad and so keeps them: moments='keep'.",
)
def sampled(
    step: int,
    names: Sequence[str],
    *,
    depth: Depths,
    count: int = 2,
    every: int = 20,
    ends: bool = True,
    redraw: bool = True,
    moments: Literal["keep", "drop"] = "drop",
    values: Literal["keep", "rewind"] = "keep",
    seed: int = 0,
) -> Phase:
    """Wake `count` of the N layers, drawn uniformly without replacement every `every` steps: gamma and K.

    A layer sleeps whole: no gradient, no weight decay, and with moments="drop" no optimizer state.

    Args:
        step: optimizer steps made so far.
        names: names of the trainable tensors.
        depth: of the model's parameters; the training loop gives it.
        count: layers awake at a time.
        every: steps between two draws.
        ends: what lies in no layer (embeddings, final norm, head) is always awake; otherwise it never is.
        redraw: False keeps the first draw to the end, the control.
        moments: what happens to the optimizer's state of a layer that falls asleep.
        values: what happens to its values: "keep", or "rewind" to those before the training.
        seed: names the draws; the training's own if not given.

    Raises:
        RequestError: more layers than there are trainable ones, or a period below 1.

    Example:
        >>> deep = Depths({"emb": 0, "l.0": 1, "l.1": 2, "head": 3}, 2)
        >>> sorted(sampled(0, ["emb", "l.0", "l.1", "head"], depth=deep, count=2).awake)
        ['emb', 'head', 'l.0', 'l.1']
    """
    layers = depth.inside(names)
    if every < 1 or not 1 <= count <= len(layers):
        raise RequestError(
            f"{count} of {len(layers)} trainable layers every {every} steps",
            expected=f"1 to {len(layers)} layers, every 1 or more steps",
            do="wake fewer layers, or make more of them trainable",
        )
    turn = step // every if redraw else 0
    order = torch.randperm(len(layers), generator=generator(seed, "sampled", turn))[:count]
    drawn = sorted(sorted(layers)[int(i)] for i in order)
    awake = {n for d in drawn for n in layers[d]}
    if ends:
        awake |= set(names) - {n for several in layers.values() for n in several}
    return Phase(
        awake=frozenset(awake), moments=moments, values=values, stage=f"{turn}:{','.join(str(d - 1) for d in drawn)}"
    )
