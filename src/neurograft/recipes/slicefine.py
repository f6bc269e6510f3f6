"""SliceFine: a few neighbouring columns or rows of every projection are trained, then the next few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

MODES = ("column", "row", "alternate")


@method(
    paper="slicefine",
    kinds={"row", "column"},
    task="text-generation",
    departs="Inferred, since no official code could be read: 100 steps between moves, a column sweep, learning rate "
    "4e-4 and warm-up 0.03 from the first author's later code, all seven projections. Biases are trained with rows "
    "only, those of the slice; the later code trains all of them. Moments are dropped at a move, so that nothing "
    "moves after it was left; those of the head's own parameters (new=) stay.",
)
def slicefine(
    *,
    r: int = 1,
    steps: int | None = 100,
    mode: str = "column",
    start: str = "random",
    ends: str = "wrap",
    bias: bool = False,
    roles: str | Sequence[str] = "block",
    head: Sequence[str] = (),
    seed: int = 0,
    lr: float = 4e-4,
    epochs: float = 4.0,
    batch: int = 16,
    warmup: float = 0.03,
    decay: float = 0.01,
) -> Recipe:
    """Train one slice of each projection for some steps, leave it with what it learned, go on with the next.

    Args:
        r: columns or rows of a slice.
        steps: steps between two moves; None for a slice that stays.
        mode: "column", "row", or "alternate" by turns.
        start: where each projection begins: "random", or "first".
        ends: after the last column or row "wrap" or "clamp", see `selectors.sweep`.
        bias: rows bring their biases along.
        roles: which projections.
        head: parameters the base's checkpoint lacks, trained throughout (patterns), e.g. ["classifier"].
        seed: names the starts.
        lr: learning rate, linear.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        decay: weight decay.

    Raises:
        RequestError: an unknown mode, or slices that alternate and never move.
    """
    if one_of(mode, MODES, what="mode") == "alternate" and steps is None:
        raise RequestError("slices that alternate and never move", expected="steps=", do="give steps=100")
    window = {"width": r, "start": start, "ends": ends, "bias": bias, "seed": seed}
    asks: list[dict[str, Any]] = [
        {
            "locate": {"by": ("within", {"by": "noise", "roles": roles}), "units": units},
            "select": {"by": ("sweep", window)},
        }
        for units in (("column", "row") if mode == "alternate" else (mode,))
    ]
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, decay=decay)
    tune: dict[str, Any] = {"do": "tune", "adapter": "slice", "args": args, "new": list(head)}
    if steps is not None:
        tune |= {"schedule": ("every", {"steps": steps, "moments": "drop"}), "reselect": asks}
    return Recipe(
        "slicefine",
        ({"do": "locate", **asks[0]["locate"]}, {"do": "select", **asks[0]["select"]}, tune),
        paper="slicefine",
    )
