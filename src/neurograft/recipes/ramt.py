"""R-AMT: a pretrained network is fitted to a task by shutting some of its attention's weights, a bit each."""

from __future__ import annotations

from collections.abc import Sequence

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe
from neurograft.recipes._everything import everything
from neurograft.recipes._training import training


@method(
    paper="ramt",
    kinds={"column"},
    task="text-classification",
    departs="The paper masks the image encoder of CLIP and classifies by similarity with fixed text features; here any "
    "classifier or decoder is masked, its head, if it is fresh, is to be trained before, and what is distilled is the "
    "model's own base at the labelled places. Fused q, k, v count as one matrix. The draws of the dropout come from a "
    "named generator.",
)
def ramt(
    *,
    roles: Sequence[str] = ("attention",),
    lam: float = 1.0,
    penalty: float = 1e-4,
    threshold: float = 5e-3,
    lr: float = 8e-5,
    epochs: float = 30.0,
    batch: int = 32,
) -> Recipe:
    """Train a mask m = [s > threshold] over attention's matrices by its straight-through gradient dL/ds = dL/dW * W.

    s begins at twice the threshold, so that nothing is masked. Where distillation from the base pulls the other way,
    the task's gradient is dropped at random; see `objectives.gradient_dropout`. The graft is the set of weights shut.

    Args:
        roles: matrices: q, k, v, o, gate, up, down, or their groups attention, ffn, block. Biases stay.
        lam: how much of a dropped gradient is taken away; 0 for none of the dropout.
        penalty: weight of the sum of the norms of s.
        threshold: below it a weight is shut.
        lr: learning rate of Adam, cosine, no decay.
        epochs: passes over the data.
        batch: examples in a batch.
    """
    args = training(lr=lr, epochs=epochs, batch=batch, warmup=0.0, schedule="cosine", max_grad_norm=0.0)
    return Recipe(
        "ramt",
        (
            *everything("column", {"roles": list(roles)}),
            {
                "do": "tune",
                "adapter": ("mask", {"shape": "straight", "at": threshold}),
                "objective": ("gradient_dropout", {"lam": lam, "penalty": penalty}),
                "optimizer": "Adam",
                "args": args,
            },
        ),
        paper="ramt",
    )
