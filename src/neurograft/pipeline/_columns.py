"""What rows of every kind share: a processor where one is needed, numbers as tensors, a label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neurograft.core.context import shifts
from neurograft.core.errors import RequestError


def need(processor: Any, row: Mapping[str, Any], index: int) -> None:
    """Raise if a raw row has nothing to encode it with."""
    if processor is None:
        raise RequestError(
            f"raw data (row {index}: {', '.join(row)}) and no tokenizer or processor",
            expected="a processing_class for raw data",
            do="pass processing_class=tokenizer, or save the tokenizer beside the model",
        )


def as_tensor(value: Any, name: str, index: int) -> Tensor:
    """Return a column's numbers as a tensor, float32 where they were float64; RequestError if they are none."""
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"the column {name!r} of row {index}, of type {type(value).__name__}",
            expected="numbers of one shape",
            do=f"leave it out, or give numbers ({error})",
        ) from error
    return found.float() if found.dtype == torch.float64 else found


def labelled(made: dict[str, Tensor], row: Mapping[str, Any], model: nn.Module, index: int) -> dict[str, Tensor]:
    """Return inputs with the row's label, if it has one, as the model counts its classes.

    Raises:
        RequestError: the model has no classes, or none of that name.
    """
    label = row.get("label")
    if label is None:
        return made
    if shifts(model):
        raise RequestError(
            f"row {index} with a label for a {type(model).__name__}, which has no classes",
            expected="prompt/completion rows for a language model",
            do="write the label as the completion, or load the model with a classification head",
        )
    if isinstance(label, str):
        names: Mapping[str, int] = getattr(model.config, "label2id", None) or {}
        if label not in names:
            raise RequestError(
                f"the label {label!r} of row {index}",
                expected=f"one of {', '.join(list(names)[:12])}",
                do="give numbers, or set config.label2id",
            )
        label = int(names[label])
    return {**made, "labels": as_tensor(label, "label", index)}
