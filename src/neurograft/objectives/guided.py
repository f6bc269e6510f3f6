"""Learning a task while its instruction vector is taken out and given back, held near the base that has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.numerics.entropies import relative_entropy
from neurograft.core.taps.instructed import additions, at_prompt_end, need_ahead, prompt_end

NEUTRAL: dict[str, Any] = {"weight": 0.0}
REDUCTIONS = ("sum", "mean")


@method(
    paper="instruction-vector",
    needs={"labels", "per_token"},
    claims={"cross_entropy"},
    departs="Padding is left out of the divergence, which the authors' trainer counts. In an accumulation window a "
    "batch's divergence counts by its share of the labelled tokens.",
)
def guided(
    step: Step,
    *,
    vector: Graft | None = None,
    weight: float = 1.0,
    sign: int = -1,
    temperature: float = 2.0,
    reduce: str = "sum",
    end_weight: float = 0.0,
    floor: float = 0.0,
) -> Tensor:
    """Return cross-entropy of the intervened student + weight * KL(student || teacher).

    The teacher is the base, the change taken out, with the vector hbar added at the last prompt token; the student has
    sign * alpha(t) * hbar added there, alpha = 1 in the first quarter of the training, then ten stairs down to 0 at
    three quarters. Both are softened by the temperature, without its square as a factor; the divergence is taken at
    all positions but the last, the prompt included. The student is left without an intervention where alpha or sign
    is 0, or no vector is given; then the teacher is the base itself.

    Args:
        step: the batch; its number among `max_steps`; its `reference` runs something on the base.
        vector: a graft of `add` operations: head means each at its own layer, or one vector in the residual stream.
        weight: of the divergence.
        sign: -1 takes the student's vector out, as in the authors' trainer of June 2024; +1 adds it; 0 leaves the
            student alone.
        temperature: of both distributions.
        reduce: "sum" over positions, then the mean over rows, as the authors' "batchmean", which grows with the
            length of the rows; "mean" over positions.
        end_weight: of the divergence at the last prompt token alone, mean over rows, as in the authors' follow-up.
        floor: a divergence counts only while it is above this; the follow-up has 0.1.

    Raises:
        RequestError: an unknown sign or reduction, a training without a reference or of unknown length, a head that
            makes no logits, a model that does not predict ahead, activation checkpointing, which would run layers
            again without the vector.
    """
    one_of(reduce, REDUCTIONS, what="reduction")
    need_ahead(step.model)
    operations, strength = additions(vector), 0.0
    if sign not in (-1, 0, 1):
        raise RequestError(f"sign={sign}", expected="-1, 0 or 1", do="scale the vector to change its size")
    if operations and sign:
        strength = sign * stair(step.step, step.max_steps)
    if operations and step.model.training and getattr(step.model, "is_activation_checkpointing", False):
        raise RequestError(
            "guided under activation checkpointing",
            expected="layers that run once",
            do="turn activation checkpointing off",
        )
    where = prompt_end(step.batch) if operations else None
    with at_prompt_end(step.model, operations, where, strength):
        step.scored()  # in the same pass; refuses where a fused head makes no logits
        student = _logits(step)
    loss = step.mean(-step.log_probs)
    if not weight and not end_weight:
        return loss

    def ask() -> Tensor:
        with at_prompt_end(step.model, operations, where):
            return _logits(Step(step.model, step.batch))

    apart = divergence(student, step.of_base(ask, who="guided"), temperature)
    return loss + step.share(step.log_probs.numel()) * _pull(step, apart, weight, reduce, end_weight, floor)


def stair(step: int, max_steps: int) -> float:
    """Return alpha at a step: 1 up to a quarter of the training, 0 from three quarters on, ten stairs between.

    alpha = 1 - ceil(20 (step / max_steps - 1/4)) / 10 there, in integers: in floats ceil(20 * (0.4 - 0.25)) is 4.

    Args:
        step: optimizer steps made so far.
        max_steps: optimizer steps in all.

    Raises:
        RequestError: the length of the training is not known.

    Example:
        >>> [stair(s, 20) for s in (0, 5, 6, 8, 15, 19)]
        [1.0, 1.0, 0.9, 0.7, 0.0, 0.0]
    """
    if max_steps < 1:
        raise RequestError(
            "guided in a training of unknown length",
            expected="a number of steps to spread the stairs over",
            do="train with tune or fit, or pass sign=0",
        )
    k = -((5 * max_steps - 20 * step) // max_steps)
    return (10 - min(10, max(0, k))) / 10


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(student || teacher) in nats of softened logits [..., V] at each place, [...].

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(float(divergence(p, q)), 4), round(float(divergence(q, p)), 4)
        (0.1438, 0.1308)
    """
    log_p, log_q = (_wide(logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return relative_entropy(log_p, log_q)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _logits(step: Step) -> Tensor:
    found: Tensor = step.predictions.logits
    return found[:, -step.batch["labels"].shape[1] :] if "labels" in step.batch else found


def _pull(step: Step, apart: Tensor, weight: float, reduce: str, end_weight: float, floor: float) -> Tensor:
    """Return the weighted divergences [B, T] over all places but the last and at the end of the prompt."""
    real = step.batch.get("attention_mask")
    real = torch.ones_like(apart, dtype=torch.bool) if real is None or real.dim() != 2 else real.bool()
    counts = real[:, 1:] & real[:, :-1]
    total = torch.where(counts, apart[:, :-1], 0.0).sum()
    terms = [(weight, total / (len(apart) if reduce == "sum" else counts.sum().clamp(min=1)))]
    if end_weight:
        terms.append((end_weight, apart[prompt_end(step.batch)].mean()))
    pull = torch.zeros((), dtype=apart.dtype, device=apart.device)
    for factor, term in terms:
        if factor and (not floor or float(term.detach()) > floor):
            pull = pull + factor * term
    return pull
