"""DPO neurons: through which neurons does a tuned model write less of something, and do their means alone do it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.core.kinds import LOWERING
from neurograft.core.ranges import above
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._training import training


@method(
    paper="dpo-neurons",
    kinds={"neuron"},
    needs={"contrast"},
    task="text-generation",
    departs="The tuned model is whatever is given as post=, such as the result of TRL's DPOTrainer; without one the "
    "recipe tunes by likelihood on the data's own answers. The probe reads the mean of the last block's residual "
    "stream by logistic regression with a penalty. Means are over the tokens of the data, not over twenty that were "
    "generated. The patch is held at every token, or at the positions asked for.",
)
def dpo_neurons(
    *,
    post: str | None = None,
    probe: str | None = None,
    groups: Sequence[str] = LOWERING,
    positions: str = "all",
    C: float = 1.0,
    lr: float = 1e-5,
    epochs: float = 1.0,
    batch: int = 8,
    warmup: float = 0.0,
) -> Recipe:
    """Split a change along a probe's direction over four groups of neurons, and patch them with their tuned means.

    P_i = mean a_i * (v_i . w / ||w||); TP-, TN-down, AP+ and AN-up are the neurons that moved so that less of w is
    written. The graft pins the inputs of the down projections of these to their means in the tuned model; the
    outcome's state holds `decomposition`, each group's share of all positive drops.

    Args:
        post: the tuned model, a folder or a Hub id; if None the data's prompts and completions are trained on.
        probe: file of rows with `positive` (what should become less) and `negative`; if None, the data's own rows
            must have these columns.
        groups: which of the four are patched.
        positions: where the means are taken and held: "all", "last", ...
        C: weight of the data in the probe.
        lr: learning rate of the tuning, linear.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    above(C=(C, 0))
    by = ("probe", {"fit": "l2", "score": "weight", "pool": "mean", "C": C})
    source: dict[str, Any] = {} if probe is None else {"data": probe}
    read = {"units": "channel", "at": "residual", "layers": [-1]}
    steps: list[dict[str, Any]] = [{"do": "locate", "by": by, **read, "as": "direction", **source}]
    if post is None:
        steps.append({"do": "tune", "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup)})
    steps.append({"do": "neurograft.pipeline.patched", "groups": list(groups), "post": post, "positions": positions})
    steps.append({"do": "intervene", "kind": "pin", "value": "$values", "positions": positions})
    return Recipe("dpo_neurons", tuple(steps), paper="dpo-neurons")
