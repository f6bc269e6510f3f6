"""Entity tracking: which heads answer, does fine-tuning keep them, and what does it improve in them?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training

# Of the 1024 heads of Llama-7B: 58, 10, 25 and 5 are taken, and the first 20, 5 and 10 are what is patched into.
STAGES: tuple[Mapping[str, Any], ...] = (
    {"name": "value_fetcher", "into": "logits", "at": "end", "share": 58 / 1024, "receivers": 20 / 1024},
    {
        "name": "position_transmitter",
        "into": "queries",
        "of": "value_fetcher",
        "at": "end",
        "share": 10 / 1024,
        "receivers": 5 / 1024,
    },
    {
        "name": "position_detector",
        "into": "values",
        "of": "position_transmitter",
        "at": "end-2",
        "share": 25 / 1024,
        "receivers": 10 / 1024,
    },
    {"name": "structure_reader", "into": "values", "of": "position_detector", "at": "mention", "share": 5 / 1024},
)


@method(
    paper="entity-tracking",
    kinds={"head"},
    needs={"contrast"},
    task="text-generation",
    departs="Numbers of heads are shares of the model's, so that small models have a circuit; a head that does not "
    "lower the answer's probability is not taken, and the search ends where nothing leads further. Places of prompts "
    "are told from where the answer begins. The tuned model is whatever is given as post=; without one the recipe "
    "tunes on the data's own answers. Half of the rows is searched with, the other half measured on; heads are at "
    "their means over the corrupt prompts, as the reference's are over other scenes with a query that nothing answers.",
)
def entity_tracking(
    *,
    post: str | None = None,
    stages: Sequence[Mapping[str, Any]] = STAGES,
    query: str = "end-2",
    desiderata: Mapping[str, Any] | None = None,
    prune: bool = True,
    metric: str = "accuracy",
    limit: int = 300,
    sets: int = 20,
    lam: float = 0.01,
    mask_lr: float = 0.1,
    mask_epochs: int = 2,
    ways: Sequence[str] = ("out", "q", "k", "v"),
    lr: float = 1e-5,
    epochs: float = 1.0,
    batch: int = 8,
    warmup: float = 0.0,
) -> Recipe:
    """Find the circuit of attention heads behind an answer, and compare it in the model and in its fine-tuned version.

    Path patching, backwards and greedy: heads that reach the logits, then the queries, keys or values of those found.
    The circuit is pruned by minimality; its faithfulness in base and tuned model and its completeness are measured
    with every other head at its mean. Masks over activations tell which variable a group carries (DCM), and patching
    from the tuned model into the base which group brings the gain (CMAP). The outcome holds `circuit`, `where`,
    `paths`, `minimality`, `faithfulness`, `completeness`, `carried`, `cmap` and the tuning's graft.

    Rows have a clean prompt with its answer in `positive` and a corrupt one in `negative`.

    Args:
        post: the tuned model, a folder or a Hub id; if None the data's prompts and completions are trained on.
        stages: of the search; see `pipeline.circuit`.
        query: the place of the token whose earlier "mention" is meant.
        desiderata: variable -> file or rows: `positive` a base prompt with the answer wanted once the variable is
            patched, `negative` the counterfactual prompt; None for no masks.
        prune: leave out heads that are not needed.
        metric: "accuracy" or "probability" of the answer.
        limit: at most so many prompts are searched with.
        sets: random sets of heads knocked out for completeness.
        lam: price of a patched head in DCM.
        mask_lr: its learning rate.
        mask_epochs: its passes.
        ways: what CMAP patches of each group.
        lr: learning rate of the tuning, linear.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    told: dict[str, Any] = {"query": query, "metric": metric, "limit": limit, "post": post}
    steps: list[dict[str, Any]] = []
    if post is None:
        steps.append({"do": "tune", "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup)})
    search = {"stages": [dict(stage) for stage in stages], "prune": prune, "sets": sets}
    steps.append({"do": "neurograft.pipeline.circuit", **search, **told})
    if desiderata:
        masks = {"lam": lam, "lr": mask_lr, "epochs": mask_epochs, "query": query}
        steps.append({"do": "neurograft.pipeline.carried.carried", "desiderata": dict(desiderata), **masks})
    steps.append({"do": "neurograft.pipeline.carried.brought", "ways": list(ways), **told})
    return Recipe("entity_tracking", tuple(steps), paper="entity-tracking")
