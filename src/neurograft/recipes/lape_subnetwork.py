"""Language subnetworks: find a language's neurons by the entropy of their firing rates, and tune only those."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="lape-subnetwork",
    kinds={"neuron"},
    needs={"contrast"},
    task="text-generation",
    departs="Only the selected rows and columns are trainable tensors, where the published code copies whole weights "
    "at every pass. A neuron fires where its gate is positive; without a gate, where its input is; in a fused "
    "bank of experts, where the product of gate and up is, and counts over all tokens. If no neuron passes the bars "
    "the nearest one is taken, and the selection's card says so.",
)
def lape_subnetwork(
    *,
    language: str | None = None,
    pool: str | None = None,
    fraction: float = 0.02,
    bar: float = 0.95,
    lr: float = 1e-4,
    decay: float = 0.01,
    epochs: float = 1.0,
    batch: int = 2,
    length: int = 512,
    warmup: float = 0.0,
) -> Recipe:
    """Tune a language's neurons, gate and up rows and down columns: those that fire in few languages, this among them.

    p_k = share of language k's tokens with gate > 0; H = entropy of p / sum p; of the neurons with some p above the
    95th percentile of all p, the `fraction` of all neurons with the lowest H; of these, the language's own are those
    with p_k above that percentile. Which neurons these are depends on the languages of the pool; the graft's card
    names them with digests.

    Args:
        language: a group of the pool; the first one if None.
        pool: file of rows with a column `group`, texts of several languages; if None, the data's own rows must have
            it, and only those of `language` are trained on.
        fraction: of all neurons, over all languages.
        bar: percentile of the rates.
        lr: learning rate of AdamW, linear.
        decay: weight decay.
        epochs: passes over the text.
        batch: texts in a batch.
        length: tokens of a text.
        warmup: share of the steps.

    Raises:
        RequestError: a pool and no language, so that nothing says which of them the data are.
    """
    if pool is not None and language is None:
        raise RequestError("pool= and no language", expected="the data's language", do="name a group of the pool")
    by = ("entropy", {"group": "$group", "bar": bar, "fraction": fraction})
    source: dict[str, Any] = {} if pool is None else {"data": pool}
    return Recipe(
        "lape_subnetwork",
        (
            {"do": "neurograft.pipeline.grouped", "group": language, **source},
            {"do": "locate", "by": by, "units": "neuron", "at": "gate|up|act", "max_length": length, **source},
            {"do": "select", "by": ("threshold", {"above": -0.5, "least": 1})},
            {
                "do": "tune",
                "max_length": length,
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, decay=decay, max_grad_norm=1.0),
                **({"data": "$own"} if pool is None else {}),
            },
        ),
        paper="lape-subnetwork",
    )
