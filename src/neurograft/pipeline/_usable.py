"""Whether an example can be used: finite numbers, tokens and labels that the model knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE, shifts
from neurograft.core.errors import RequestError

CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)


def check(example: Mapping[str, Any], model: nn.Module, index: int) -> None:
    """Raise if numbers are not finite, or tokens or labels lie outside of what the model knows.

    Raises:
        RequestError: naming the row.
    """
    for name, value in example.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise RequestError(
                f"{name} of row {index} with numbers that are not finite", expected="finite inputs", do="clean the data"
            )
    tokens = example.get("input_ids")
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    size: int = getattr(text, "vocab_size", None) or 0
    for token in _extremes(tokens) if size else ():
        if not 0 <= token < size:
            raise RequestError(
                f"token {token} in row {index} for a vocabulary of {size}",
                expected="this model's own tokenizer",
                do="encode with the tokenizer saved beside the model",
            )
    labels, kind = example.get("labels"), type(model).__name__
    beside = shifts(model) or kind.endswith(("ForMaskedLM", "ForTokenClassification"))  # a label for every token
    if beside and isinstance(tokens, Tensor) and isinstance(labels, Tensor) and tokens.shape != labels.shape:
        raise RequestError(
            f"labels of shape {tuple(labels.shape)} beside tokens of shape {tuple(tokens.shape)} in row {index}",
            expected="a label for every token",
            do=f"fill up with {IGNORE}, which stands for none",
        )
    known = size if shifts(model) or kind.endswith("ForMaskedLM") else 0
    if kind.endswith(CLASSIFIERS) and getattr(config, "problem_type", None) in (None, "single_label_classification"):
        known = int(getattr(config, "num_labels", 1))  # 1 for numbers instead of classes
    for label in _extremes(labels, but=IGNORE) if known > 1 else ():
        if not 0 <= label < known:
            raise RequestError(
                f"the label {label} of row {index}",
                expected=f"a number from 0 to {known - 1}, or {IGNORE} for none",
                do="number the labels anew, or load the model with num_labels= as many as there are",
            )


def _extremes(numbers: Any, *, but: int | None = None) -> tuple[int, ...]:
    """Return the least and the largest of whole numbers, one of them left out."""
    if not isinstance(numbers, Tensor) or numbers.is_floating_point():
        return ()
    kept = numbers if but is None else numbers[numbers != but]
    return (int(kept.min()), int(kept.max())) if kept.numel() else ()
