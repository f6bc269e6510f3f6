"""LISA: a few layers at a time, drawn anew every few steps, with embeddings and head always awake."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="lisa",
    kinds={"layer"},
    task="text-generation",
    departs="Moments of a layer are dropped when it falls asleep, which the memory claim needs; moments='keep' is the "
    "maintained implementation, which toggles requires_grad alone. The change that ships is dense: every layer was "
    "awake at some time. Under several processes sleeping layers compute gradients that are thrown away. On a tiny "
    "decoder sampled layers learn but do not beat a fixed random one; the proof's record has the numbers.",
)
def lisa(
    *,
    gamma: int = 2,
    K: int = 20,
    moments: str = "drop",
    lr: float = 2e-5,
    epochs: float = 1.0,
    batch: int = 16,
    warmup: float = 0.03,
    schedule: str = "cosine",
) -> Recipe:
    """Train embeddings, final norm and head all the time, and gamma of the N layers, drawn every K steps.

    Args:
        gamma: layers awake at a time; each is with probability gamma / N.
        K: optimizer steps between two draws.
        moments: "drop" or "keep" the optimizer's state of a layer that falls asleep.
        lr: learning rate, with warm-up.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
        schedule: of the learning rate.
    """
    drawn = ("sampled", {"count": gamma, "every": K, "moments": moments})
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule=schedule)
    return Recipe("lisa", ({"do": "tune", "adapter": "dense", "schedule": drawn, "args": args},), paper="lisa")
