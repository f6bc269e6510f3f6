"""GoodVibe: neurons by one backward pass over a yes/no task, grouped by how they act, one vector for each group."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.core.ranges import least
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="goodvibe",
    kinds={"neuron"},
    task="text-generation",
    departs="Inferred, since the paper's code was not found: grad x activation as the score (score='grad' for the "
    "gradient alone), the share of neurons taken in each layer, standardised profiles, gate and up rows both moving, "
    "the training arguments. K = 8 groups a layer is arithmetic from the published ratio of trained numbers. Weight "
    "decay, off by default, would pull the shared vectors to 0.",
)
def goodvibe(
    *,
    labelled: str | None = None,
    fraction: float = 0.02,
    score: str = "grad_x_act",
    k: int = 8,
    parts: str = "reads",
    limit: int | None = 256,
    lr: float = 1e-3,
    epochs: float = 3.0,
    batch: int = 16,
    warmup: float = 0.0,
) -> Recipe:
    """Locate neurons by a labelled yes/no task, cluster them in each layer, train W[i] = W0[i] + delta of i's cluster.

    Score of a neuron: mean over examples of |a * dL/da|, L the loss of the one-token answer; the best of each layer
    are taken.

    Args:
        labelled: file of prompt/completion rows whose completion is the yes/no answer, to locate with; None for the
            tuning data's own rows.
        fraction: share of the neurons of each layer.
        score: "grad_x_act" or "grad".
        k: clusters a layer (k-means over activation profiles).
        parts: which of a neuron's numbers share a vector: "reads" (its rows of gate and up), "writes" (its column of
            down), or positions in the site's parts.
        limit: examples the neurons are located on.
        lr: learning rate, linear.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    least(k=(k, 1))
    source: dict[str, Any] = {} if labelled is None else {"data": labelled}
    one_of(score, ("grad_x_act", "grad"), what="score")
    by = ("grad_x_act", {"multiply": score == "grad_x_act"})
    return Recipe(
        "goodvibe",
        (
            {"do": "locate", "by": by, "units": "neuron", "limit": limit, **source},
            {"do": "select", "by": ("only", {"parts": parts}), "fraction": fraction, "per": "layer"},
            {"do": "neurograft.pipeline.clustered", "k": k, **source},
            {
                "do": "tune",
                "adapter": ("slice", {"tie": "site"}),
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup),
            },
        ),
        paper="goodvibe",
    )
