"""Critical layers: the ones around the point where representations change most, found on any prompts."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

USES = ("train", "freeze")


@method(
    paper="spectral-layers",
    kinds={"layer"},
    task="text-generation",
    departs="The window around the change point is clipped at the ends of the stack, so that it may hold other layers "
    "than those the score was averaged over. Training arguments are ours.",
)
def spectral_layers(
    *,
    use: str = "train",
    window: int = 5,
    prompts: int = 300,
    lr: float = 1e-4,
    epochs: float = 1.0,
    batch: int = 16,
    warmup: float = 0.03,
) -> Recipe:
    """Train only the layers around the change point, or everything but them (against poisoned data).

    `neurograft.edits.remove_components` takes main directions out of a layer's output; `pipeline.put_back` swaps
    tuned layers back, which tells how much of a change lies in them.

    Args:
        use: "train" the critical layers alone, or "freeze" them.
        window: layers compared for the score, and layers around the change point that are critical; odd, 3 or 5.
        prompts: examples the score is taken from.
        lr: learning rate, cosine with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    by = ("change_point", {"window": window, "around": True})
    # Nearness counts down from 1 by whole layers, with at most a half added: the bar lies below the last one wanted.
    name, how = ("where", {}) if one_of(use, USES, what="use") == "train" else ("frozen", {"protect": "$frozen"})
    return Recipe(
        "spectral_layers",
        (
            {"do": "locate", "by": by, "units": "layer", "at": "residual", "limit": prompts},
            {"do": "select", "by": "threshold", "above": 0.75 - window // 2, "as": name},
            {
                "do": "tune",
                "adapter": "dense",
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine"),
                **how,
            },
        ),
        paper="spectral-layers",
    )
