"""RevFFN: full fine-tuning, of experts too, whose activation memory does not grow with depth."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="revffn",
    task="text-generation",
    departs="The standard coupling, which can always be inverted, unless form='coupled' says the paper's, which is "
    "checked in every forward pass. How the projections start and how long they are trained alone is inferred, the "
    "paper's code being unpublished; so are the learning rate and its course.",
)
def revffn(
    *,
    form: str = "standard",
    lr: float = 1e-5,
    warmup: float = 100,
    epochs: float = 3.0,
    batch: int = 8,
) -> Recipe:
    """Tune every parameter with the layers as reversible blocks, after their projections have found their place.

    The blocks are another network than the pretrained one, which the first steps have to make up for.

    Args:
        form: "standard" or "coupled".
        lr: learning rate, cosine.
        warmup: steps in which the projections move alone.
        epochs: passes over the data.
        batch: examples in a batch.
    """
    from neurograft.networks.reversible import FORMS  # a network, which only who makes the recipe needs

    one_of(form, FORMS, what="form")
    tune: dict[str, Any] = {
        "do": "tune",
        "adapter": ("reversible", {"form": form}),
        "args": training(lr=lr, epochs=epochs, batch=batch, warmup=0.0, schedule="cosine"),
    }
    if warmup:
        tune["schedule"] = ("stages", {"parts": [("*.half_*", int(warmup)), ("*", 1)]})
    return Recipe("revffn", (tune,), paper="revffn")
