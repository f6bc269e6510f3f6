"""Labels, and what the model said of an example when it was put into a buffer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.choose import choose
from neurograft.core.context import IGNORE, Step, shifts
from neurograft.core.errors import RequestError
from neurograft.core.numerics.entropies import relative_entropy

COLUMN = "remembered"
NEUTRAL: dict[str, Any] = {}  # what no memory is kept of is plain cross-entropy


@method(
    paper="fpf",
    needs={"labels"},
    claims={"cross_entropy"},
    departs="Weight and temperature of the distillation could not be read; it is KL(then || now).",
)
def remembered(step: Step, *, weight: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Return the model's own loss + weight * T^2 * mean KL(p_then || p_now) of softened predictions.

    Args:
        step: the batch; its column `remembered` holds logits shaped like the model's, among its inputs or beside
            them. A batch without it, as of the stream, gives the model's own loss.
        weight: of the distillation.
        temperature: T.

    Raises:
        RequestError: remembered logits of another shape.
    """
    then = {**step.batch, **step.extra}.get(COLUMN)
    plain = replace(step, batch={k: v for k, v in step.batch.items() if k != COLUMN})
    loss: Tensor = choose("objectives", "auto")(plain)
    step.counted = plain.counted
    if then is None:
        return loss
    now = plain.outputs.logits
    if then.shape != now.shape:
        raise RequestError(
            f"remembered logits of shape {tuple(then.shape)}",
            expected=f"{tuple(now.shape)}, as the model's",
            do="keep what this model says of the same batch",
        )
    p, q = ((v.float() / temperature).log_softmax(-1) for v in (then, now))
    places, labels = relative_entropy(p, q), plain.batch["labels"]
    kept = labels != IGNORE if labels.shape == places.shape else torch.ones_like(places, dtype=torch.bool)
    if shifts(step.model):
        kept = kept.roll(-1, 1)
        kept[:, -1] = False
    mean = places[kept].mean() * temperature**2
    return loss + weight * mean * step.share(kept.sum())
