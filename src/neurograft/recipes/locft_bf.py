"""LocFT-BF: fine-tuning as an editor: one matrix, all edits shuffled together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe


@method(
    paper="locft-bf",
    task="text-generation",
    departs="The place is a late down-projection unless layers=, matrix= or sweep= say otherwise; sweep it on a new "
    "model, as the paper does. What else differs stands on the card of the edit.",
)
def locft_bf(
    *,
    order: str = "breadth",
    layers: Sequence[int] | None = None,
    matrix: str = "down",
    sweep: int = 0,
    lr: float = 5e-4,
    epochs: int = 25,
    batch: int = 64,
    separate: bool = False,
) -> Recipe:
    """Train one matrix on the targets of all requests, shuffled into batches, until they are said.

    Args:
        order: "breadth", or "depth" for one request after another.
        layers: the one layer to train, or the layers to sweep; a late one if None.
        matrix: "down", "up" or "gate".
        sweep: how many requests to try every place with first.
        lr: of Adam.
        epochs: at most so many.
        batch: requests in a batch.
        separate: ranks of its own for every request, so that `ng.rollback` can take it out alone; not the paper's.
    """
    options: dict[str, Any] = {"order": order, "matrix": matrix, "sweep": sweep, "separate": separate}
    options |= {"lr": lr, "epochs": epochs, "together": batch}
    options |= {} if layers is None else {"layers": list(layers)}
    return Recipe("locft_bf", ({"do": "edit", "by": ("locft_bf", options)},), paper="locft-bf")
