"""What `locate` attributes to instead of the loss: a callable, or tokens whose logits count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import Batch, Said
from neurograft.core.errors import RequestError
from neurograft.pipeline.inputs import processor_for

Target = Callable[[Any, Batch], Tensor] | str | tuple[str, str] | None


def target_of(target: Target, model: nn.Module, processing_class: Any) -> Callable[[Any, Batch], Tensor] | None:
    """Return a target as a callable: one token's logit at the last real position, or the difference of two.

    Raises:
        RequestError: a word that is not one token.
    """
    if target is None or callable(target):
        return target
    tokenizer = processor_for(model, processing_class)
    words = (target,) if isinstance(target, str) else tuple(target)
    if tokenizer is None or not 1 <= len(words) <= 2:
        raise RequestError(
            f"target={target!r}" + (" and no tokenizer" if tokenizer is None else ""),
            expected="one or two tokens and a tokenizer, or a callable (outputs, batch) -> scalar",
            do="pass processing_class=tokenizer",
        )
    ids = [_single(tokenizer, word) for word in words]

    def logit(outputs: Any, batch: Batch) -> Tensor:
        logits = outputs.logits
        mask = batch.get("attention_mask")
        index = torch.arange(logits.shape[1], device=logits.device)
        last = (index * mask).max(dim=1).values if mask is not None else index[-1:].expand(len(logits))
        at = logits[torch.arange(len(logits), device=logits.device), last]
        found: Tensor = at[:, ids[0]].mean() - (at[:, ids[1]].mean() if len(ids) == 2 else 0.0)
        return found

    return Said(logit)


def _single(tokenizer: Any, word: str) -> int:
    found = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        raise RequestError(
            f"the target {word!r}, which is {len(found)} tokens",
            expected="a single token",
            do="choose a word the vocabulary has whole (mind the leading space)",
        )
    return int(found[0])
