"""Batches of model inputs: which of their tokens count, and whether the model's logits look one token ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, one_of

Batch = dict[str, Any]
IGNORE = -100
POSITIONS = ("all", "last", "answer", "prompt")


def unlabelled(batch: Mapping[str, Any]) -> Batch:
    """Return a batch without its labels: what a model is given to predict, and not to compute its loss.

    Example:
        >>> unlabelled({"input_ids": 1, "labels": 2})
        {'input_ids': 1}
    """
    return {k: v for k, v in batch.items() if k != "labels"}


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter is, and so its inputs belong; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def token_mask(batch: Batch, positions: str | Callable[[Batch], Tensor] = "all") -> Tensor | None:
    """Return which tokens of a batch count, bool [B, T], or None for batches without tokens.

    "all": every token but padding; "last": the last of those; "answer": tokens with a label; "prompt": tokens
    before the first labelled one.

    Raises:
        RequestError: labels are asked for and missing, or a callable returns another shape.

    Example:
        >>> batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
        >>> token_mask(batch, "last").tolist()
        [[False, False, True, False]]
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds", batch.get("decoder_input_ids")))
    if tokens is None:
        if positions != "all":
            raise RequestError(
                f"positions={positions!r} for data without tokens", expected="positions='all'", do="leave positions out"
            )
        return None
    shape = tuple(tokens.shape[:2])
    attention = batch.get("attention_mask")
    real = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    if attention is not None and attention.dim() == 2:
        real = attention.bool()
    if callable(positions):
        chosen = positions(batch)
        if tuple(chosen.shape) != shape:
            raise RequestError(
                f"positions of shape {tuple(chosen.shape)}",
                expected=f"bool {shape}",
                do="return one flag for each token",
            )
        return chosen.bool() & real
    one_of(positions, POSITIONS, what="positions")
    index = torch.arange(shape[1], device=tokens.device)
    if positions == "all":
        return real
    if positions == "last":
        last = torch.where(real, index, -1).max(dim=1).values
        return real & (index == last[:, None])
    labels = batch.get("labels")
    if labels is None or tuple(labels.shape) != shape:
        raise RequestError(
            f"positions={positions!r} for data without token labels",
            expected="labels [B, T]",
            do="give prompt/completion rows, or positions='all' or 'last'",
        )
    labelled = labels != IGNORE
    if positions == "answer":
        return labelled & real
    first = torch.where(labelled, index, shape[1]).min(dim=1).values
    return real & (index < first[:, None])


def shifts(model: nn.Module) -> bool:
    """Say whether position t of the logits predicts token t + 1."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    kind = getattr(model, "loss_type", None) or ""
    return kind in ("ForCausalLM", "ForConditionalGeneration", "ForImageTextToText") or type(model).__name__.endswith(
        ("ForCausalLM", "LMHeadModel")
    )
