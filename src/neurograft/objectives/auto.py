"""What the model itself is trained for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.context import IGNORE, Step, shifts
from neurograft.core.errors import RequestError
from neurograft.core.prompts.examples import size

NEUTRAL: dict[str, Any] = {}

# Classes whose loss is a mean over the labels that are not ignored.
MEANS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForVideoClassification",
    "ForMaskedLM",
    "ForPreTraining",
    "ForConditionalGeneration",
    "EncoderDecoderModel",
    "MTModel",
)


@method(needs={"labels"}, claims={"cross_entropy"})
def auto(step: Step) -> Tensor:
    """Return the token likelihood for causal language models, and the loss the model returns for any other.

    A loss that is a mean over labels is weighted by the batch's share of the accumulation window, so that uneven
    batches add up to the loss of one big batch; one that is a sum over rows (CTC) is added up as it is, and one that is
    a mean over rows (CTC by ctc_loss_reduction="mean") is weighted by the batch's share of the window's rows. A
    router's balance loss is added as the model adds it.

    Args:
        step: the batch, its outputs and the size of the window.

    Raises:
        RequestError: the model returns no loss, or nothing in the batch has a label.
    """
    if shifts(step.model) and "labels" in step.batch:
        return step.mean(-step.log_probs) + _balance(step)
    if "labels" not in step.batch and "return_loss" in inspect.signature(step.model.forward).parameters:
        step.batch = {**step.batch, "return_loss": True}  # contrastive models: every pair is its own label
    labels, mean = step.batch.get("labels"), type(step.model).__name__.endswith(MEANS)
    if mean and isinstance(labels, Tensor) and not bool((labels != IGNORE).any()):
        raise RequestError(
            "a batch in which nothing has a label",
            expected="at least one label, since the loss is their mean",
            do="drop such rows, or raise the truncation length",
        )
    loss = getattr(step.outputs, "loss", None)
    if loss is None:
        raise RequestError(
            f"a {type(step.model).__name__}, which returns no loss on these columns: {', '.join(sorted(step.batch))}",
            expected="labels, and a model that computes a loss",
            do="give labelled rows, or objective=callable (model, batch) -> loss",
        )
    if step.apart and isinstance(labels, Tensor) and (step.items is None or _sums(step.model)):
        return _by_row(step, loss, labels)
    if step.rows is not None and _ctc(step.model) == "mean":
        step.counted = True
        return loss * size(step.batch) / step.rows
    if step.items is None or not isinstance(labels, Tensor) or not (mean or _sums(step.model)):
        return loss
    step.counted = True
    if _sums(step.model):  # sums over rows add up as they are: a row counts alike in windows of one batch and of many
        return loss
    return loss * (labels != IGNORE).sum() / step.items


def _by_row(step: Step, loss: Tensor, labels: Tensor) -> Tensor:
    """Return a loss over all labels as the mean of what the rows' losses would be alone."""
    if _sums(step.model):
        return loss / len(labels)
    logits = getattr(step.outputs, "logits", None)
    by_token = isinstance(logits, Tensor) and labels.dim() > 1 and logits.shape[:-1] == labels.shape
    if not by_token or not type(step.model).__name__.endswith(MEANS):
        return loss
    plain = -step.log_probs
    return loss + step.mean(plain) - plain.mean()


def _sums(model: nn.Module) -> bool:
    """Say whether a model's loss is a sum over the batch's rows, as that of most CTC models is."""
    return _ctc(model) == "sum"


def _ctc(model: nn.Module) -> str:
    """Return how a CTC model reduces its rows' losses: "sum"; "mean" of each over its labels, then over rows; or ""."""
    config: Any = getattr(model, "config", None)
    return str(getattr(config, "ctc_loss_reduction", "")) if type(model).__name__.endswith("ForCTC") else ""


def _balance(step: Step) -> Tensor:
    found = getattr(step.predictions, "aux_loss", None)
    coefficient = getattr(getattr(step.model, "config", None), "router_aux_loss_coef", None)
    if not isinstance(found, Tensor) or not coefficient:
        return torch.zeros((), device=step.log_probs.device)
    return coefficient * found * step.share(step.log_probs.numel())
