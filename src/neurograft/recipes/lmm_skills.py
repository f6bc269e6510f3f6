"""New skills without losing the old: attention projections, or gate and up with down frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neurograft.core.card import method
from neurograft.core.errors import one_of
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import everything
from neurograft.recipes._training import training

PARTS: Mapping[str, Sequence[str]] = {
    "attention": ("q", "k", "v", "o"),
    "gate_up": ("gate", "up"),
    "down": ("down",),
    "ffn": ("gate", "up", "down"),
}


@method(
    paper="lmm-skills",
    kinds={"module"},
    task="text-generation",
    departs="Proved on text-only decoders. One skill at a time: a sequence is a sequence of runs. In families without "
    "a gate, gate_up is the first FFN matrix. On a tiny decoder the paper's order holds against full tuning (held-out "
    "KL) and not against the down projection alone; the proof's record has the numbers.",
)
def lmm_skills(
    *,
    train: str = "gate_up",
    lr: float = 5e-6,
    epochs: float = 1.0,
    batch: int = 32,
    warmup: float = 0.03,
) -> Recipe:
    """Fine-tune whole projections of the language layers; embeddings, norms, head and vision tower stay frozen.

    The down projection writes straight into the residual stream, and so moves the marginals of the output tokens
    most; the audits `token_marginal` and `layer_contribution` measure that.

    Args:
        train: "attention" (q, k, v, o), "gate_up" (down frozen); "down" and "ffn" are the paper's comparisons.
        lr: learning rate, cosine with warm-up, no weight decay.
        epochs: passes over the data.
        batch: examples in a batch.
        warmup: share of the steps.
    """
    roles = list(PARTS[one_of(train, PARTS, what="part to train")])
    return Recipe(
        "lmm_skills",
        (
            *everything("module", {"roles": roles, "language": True}),
            {
                "do": "tune",
                "adapter": "dense",
                "args": training(lr=lr, epochs=epochs, batch=batch, warmup=warmup, schedule="cosine"),
            },
        ),
        paper="lmm-skills",
    )
