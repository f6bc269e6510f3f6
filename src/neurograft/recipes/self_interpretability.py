"""Self-interpretability: instil preferences by examples, then teach a model to say what it prefers."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.ranges import least
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

NAMES = ("instilled", "introspection")


@method(
    paper="self-interpretability",
    needs={"scenarios"},
    task="text-generation",
    departs="Both stages are LoRA as in the open re-run; the paper tuned models behind an interface that does not say "
    "how. The last step's weights are kept, where the re-run keeps the epoch with the lowest validation loss. "
    "Prompts have wordings of their own. Weights are measured on the model that reports, also for native scenarios, "
    "where the paper measures the model before introspection training, or the base. The proof's tiny base was taught "
    "to recite stated weights, and its second stage replays the first: of spontaneous introspection and of native "
    "preferences it shows nothing. See also `audits.self_report`.",
)
def self_interpretability(
    *,
    trials: int = 50,
    examples: int = 1,
    train: str = "first",
    adapter: Any = "lora",
    report_adapter: Any = None,
    r: int = 64,
    alpha: float = 128.0,
    dropout: float = 0.05,
    lr: float = 5e-5,
    epochs: float = 3.0,
    batch: int = 32,
    warmup: float = 0.03,
    decay: float = 0.01,
    report_lr: float = 1e-5,
    report_epochs: float = 5.0,
    report_batch: int = 8,
    replay: float = 0.0,
    choices: int = 50,
    reports: int = 10,
    length: int | None = None,
    standardise: str = "scenario",
    max_length: int = 2048,
) -> Recipe:
    """Fine-tune on choices by hidden weights, then on reports of the weights of half the scenarios; test on the rest.

    A scenario is a role, a choice and K attributes with units and ranges; utility = sum_k w_k (x_k - low_k) /
    (high_k - low_k); the rows of the first stage show trials and the better option's letter, never a weight. The graft
    holds both stages; `graft.card["self_report"]` has r of reported with measured weights after each, on held-out and
    trained scenarios, with intervals and controls. Spontaneous introspection, r before any report was trained, takes a
    chat model.

    Args:
        trials: choices a scenario in the first stage.
        examples: reports a scenario in the second.
        train: whose reports are trained: the "first" half, the "last" (swap and run again), or "all".
        adapter: "lora" with the three options below, or another choice of `adapters`.
        report_adapter: of the second stage; that of the first if None.
        r: rank.
        alpha: scale = alpha / r.
        dropout: on the updates' inputs.
        lr: learning rate of the first stage, cosine.
        epochs: its passes.
        batch: its examples in a batch.
        warmup: share of its steps.
        decay: weight decay of both stages.
        report_lr: learning rate of the second stage, constant.
        report_epochs: its passes.
        report_batch: its examples in a batch.
        replay: weight of the first stage's rows in the second stage's loss, so that reporting does not unlearn
            choosing; the paper and its re-run have none.
        choices: fresh trials a scenario from which weights are measured.
        reports: reports a scenario that are averaged.
        length: tokens a report may take; what the prompts foresee if None.
        standardise: "scenario", or "pooled" as the reference.
        max_length: longer rows are cut.

    The data are scenarios: rows with `name`, `question`, `attributes` (each with `name`, `units`, `range`), and
    perhaps `role`, `weights` and `native`; or a `worlds.preferences.Preferences`.
    """
    least(trials=(trials, 1), r=(r, 1), choices=(choices, 1), reports=(reports, 1), length=(length, 1))
    low = ("lora", {"r": r, "alpha": alpha, "dropout": dropout})
    shape, other = (low if chosen == "lora" else chosen for chosen in (adapter, report_adapter or adapter))
    first = training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine", decay=decay)
    second = training(
        lr=report_lr, epochs=report_epochs, batch=report_batch, warmup=0.0, schedule="constant", decay=decay
    )
    tune: dict[str, Any] = {"do": "tune", "max_length": max_length}
    later: dict[str, Any] = {**tune, "data": "$explanations", "on": NAMES[0], "adapter": other, "args": second}
    if replay:
        later["anchor"] = ("likelihood", {"weight": replay, "data": "$decisions"})
    measure = {"trials": choices, "reports": reports, "length": length, "standardise": standardise}
    return Recipe(
        "self_interpretability",
        (
            {"do": "neurograft.pipeline.preferences", "trials": trials, "examples": examples, "train": train},
            {**tune, "data": "$decisions", "adapter": shape, "args": first, "as": NAMES[0]},
            {**later, "as": NAMES[1]},
            {"do": "neurograft.pipeline.summed", "of": list(NAMES)},
            {"do": "neurograft.pipeline.self_reported", "of": [NAMES[0], "graft"], **measure},
        ),
        paper="self-interpretability",
    )
