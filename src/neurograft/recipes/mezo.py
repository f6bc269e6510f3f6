"""MeZO: fine-tuning with forward passes alone, in the memory of inference."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

# What is trained, and the paper's learning rate and distance for it.
PARTS = {
    "all": (("dense", {"originals": "disk"}), 1e-6, 1e-3),
    "lora": (("lora", {"r": 8, "alpha": 16.0}), 5e-5, 1e-2),
}


@method(
    paper="mezo",
    task="text-generation",
    departs="As many passes over the data as asked for instead of 20 000 steps. No prefix. Shifted numbers are made "
    "for each use and never written into the model, so text generated token by token draws the noise anew for every "
    "token; the graft is the log of seeds and scalars.",
)
def mezo(
    *,
    parts: str = "all",
    lr: float | None = None,
    eps: float | None = None,
    n: int = 1,
    decay: float = 0.0,
    epochs: float = 20.0,
    batch: int = 16,
) -> Recipe:
    """Tune on the difference of two losses along a random direction, with no gradient.

    For a metric that has no gradient, pass `tune.objective`: a callable (model, batch) -> number, less is better.

    Args:
        parts: "all" parameters in the memory of inference, or "lora".
        lr: learning rate, constant; 1e-6 for all parameters, 5e-5 for LoRA.
        eps: how far to look on both sides; 1e-3 and 1e-2.
        n: directions averaged in a step.
        decay: weight decay, not on biases and norms.
        epochs: passes over the data.
        batch: examples in a batch.
    """
    adapter, rate, distance = PARTS[one_of(parts, PARTS, what="part to train")]
    args = training(
        lr=rate if lr is None else lr, epochs=epochs, batch=batch, warmup=0.0, schedule="constant", decay=decay
    )
    optimizer = ("mezo", {"eps": distance if eps is None else eps, "n": n})
    return Recipe("mezo", ({"do": "tune", "adapter": adapter, "optimizer": optimizer, "args": args},), paper="mezo")
