"""Evolution strategies with a population of about thirty, whatever the model's size."""

from __future__ import annotations

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

SCHEDULES = ("constant", "linear", "cosine")


@method(
    paper="es-landscape",
    task="text-generation",
    departs="The paper only analyses the method: the settings are its companion's (arXiv 2509.24372). The loss of the "
    "data stands for the reward unless tune.objective names one; the learning rate falls to 0, as its analysis advises "
    "against the decay after the peak (schedule='constant' is the companion's). Batches of 16.",
)
def es_landscape(
    *,
    lr: float = 5e-4,
    sigma: float = 1e-3,
    n: int = 30,
    schedule: str = "linear",
    epochs: float = 20.0,
    batch: int = 16,
) -> Recipe:
    """Tune all parameters by the rewards of perturbed models, with no gradient, in the memory of inference.

    For a reward, pass `tune.objective`: a callable (model, batch) -> number, less is better. The audit `landscape`
    says beforehand whether a sigma finds better models at all, and afterwards whether the reward peaked and fell.

    Args:
        lr: the paper's alpha.
        sigma: how far the population spreads.
        n: its size.
        schedule: of the learning rate: "linear" or "cosine" to 0, or "constant".
        epochs: passes over the data.
        batch: examples in a batch.
    """
    args = training(
        lr=lr, epochs=epochs, batch=batch, warmup=0.0, schedule=one_of(schedule, SCHEDULES, what="schedule")
    )
    tune = {
        "do": "tune",
        "adapter": ("dense", {"originals": "disk"}),
        "optimizer": ("evolution", {"sigma": sigma, "n": n}),
        "args": args,
    }
    return Recipe("es_landscape", (tune,), paper="es-landscape")
