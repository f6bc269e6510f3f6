"""NeuroStrike, for audit and hardening: find the units a guarded behaviour hangs on, and tune without losing it."""

from __future__ import annotations

from typing import Any

from neurograft.core.card import method
from neurograft.core.ranges import above, least
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import everything
from neurograft.recipes._training import training


@method(
    paper="neurostrike",
    kinds={"row"},
    needs={"contrast"},
    task="text-generation",
    departs="The defensive reading only. The paper prunes the units to break refusals and trains a prompt generator "
    "against hosted models; neither is built here. The probe, its threshold and its site are the published ones, read "
    "in the authors' code, except that padding is left out of the pool (padding=True as published). The hardening is "
    "ours: protecting the units alone only delays the loss of a refusal that the tuning data contradict; an anchor "
    "on the guarded answers holds it (the proof's record has both).",
)
def neurostrike(
    *,
    guard: str | None = None,
    keep: str | None = None,
    bar: float = 3.0,
    padding: bool = False,
    probe_epochs: int = 5000,
    probe_lr: float = 1e-3,
    decay: float = 1e-3,
    anchor: float = 1.0,
    lr: float = 1e-4,
    epochs: float = 1.0,
    batch: int = 16,
    warmup: float = 0.0,
) -> Recipe:
    """Locate safety units by a linear probe and harden them: tune the FFN's other neurons, hold the guarded answers.

    For audit and hardening of models one is responsible for: it locates the units that tell guarded prompts from
    ordinary ones, `audits.concentration` measures on how few of them the guarded answers hang, and what of that
    carries over from a base to its fine-tuned descendants, and this recipe tunes a model so that it keeps refusing.
    It generates no attack prompts, targets no hosted model and ships no pruned one.

    Per gate and per up projection: activations before the nonlinearity, max over the prompt's tokens;
    logit(x) = w . x + b by full-batch Adam; z = (w - mean w) / std w; a safety unit has |z| > 3 and w > 0.

    Args:
        guard: file of rows with `positive` (guarded) and `negative` (ordinary) prompts to locate with; if None, the
            tuning data's own rows must have these columns.
        keep: file of guarded prompts with the answers to hold, prompt/completion; None for no anchor.
        bar: of |z|; in a module of n units, m equal outliers reach sqrt((n - m) / m), and where no unit passes, the
            single best one is taken.
        padding: pool over padding too, as published.
        probe_epochs: steps of the probe's Adam.
        probe_lr: its step size.
        decay: its weight decay.
        anchor: weight of KL(base || tuned) on the rows of `keep`.
        lr: learning rate of the tuning, linear.
        epochs: passes over the tuning data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    least(probe_epochs=(probe_epochs, 1), anchor=(anchor, 0))
    above(probe_lr=(probe_lr, 0))
    options = {"padding": padding, "epochs": probe_epochs, "lr": probe_lr, "decay": decay}
    by = ("within", {"by": ("probe", options), "roles": ["gate", "up"]})
    source: dict[str, Any] = {} if guard is None else {"data": guard}
    held = None if keep is None else ("kl", {"weight": anchor, "data": keep})
    return Recipe(
        "neurostrike",
        (
            {"do": "locate", "by": by, "units": "row", **source},
            {"do": "select", "by": ("threshold", {"above": bar, "least": 1}), "as": "rows"},
            {"do": "neurograft.pipeline.owning", "of": "rows", "units": "neuron", "name": "safety"},
            *everything("neuron", scores="order", **source),
            {
                "do": "tune",
                "protect": "$safety",
                "anchor": held,
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup),
            },
        ),
        paper="neurostrike",
    )
