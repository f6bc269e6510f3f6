"""NMKE: facts written into FFNs one batch after another, each over the neurons that speak in its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe


@method(
    paper="nmke",
    kinds={"neuron"},
    task="text-generation",
    departs="Learning rate, null-space threshold and L2 count in units of the model's own stream and keys, so that one "
    "setting serves models of any scale; absolute=True takes them as they are, then the numbers usual for Llama-3-8B "
    "are lr=0.1, null=0.02, ridge=10. What else differs stands on the card of the edit.",
)
def nmke(
    *,
    mask: str = "post",
    null: float | None = 2e-2,
    ridge: float = 1e-2,
    weight: float = 0.0,
    layers: Sequence[int] | None = None,
    steps: int = 25,
    lr: float = 0.5,
    clamp: float = 0.75,
    decay: float = 0.5,
    absolute: bool = False,
    batch: int = 100,
) -> Recipe:
    """Edit requests in batches by NMKE; mask="none" is AlphaEdit, with null=None and weight > 0 MEMIT.

    Args:
        mask: "post" as the paper, "solve" keeps what is protected exactly, "none".
        null: null-space threshold.
        ridge: L2.
        weight: how much the covariance of the protected keys counts.
        layers: whose FFNs; a share of the depth as 4 to 8 of 32 if None.
        steps: of the search for values.
        lr: its learning rate.
        clamp: largest change of the stream at a subject, as a share of its norm.
        decay: weight of its norm.
        absolute: lr, null and ridge in the model's own units.
        batch: requests at a time.
    """
    options: dict[str, Any] = {"mask": mask, "null": null, "ridge": ridge, "weight": weight, "steps": steps, "lr": lr}
    options |= {"clamp": clamp, "decay": decay, "absolute": absolute}
    options |= {} if layers is None else {"layers": list(layers)}
    return Recipe("nmke", ({"do": "edit", "by": ("nmke", options), "batch": batch},), paper="nmke")
