"""Batches example by example: splitting them, and digests that tell whether two sets share one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import digest
from neurograft.core.prompts.passing import INPUTS, examples, tokens_of

BESIDE = ("pixel_values", "input_values", "input_features")  # inputs that may stand beside tokens


def size(batch: Mapping[str, Any]) -> int:
    """Return how many examples a batch holds.

    Raises:
        RequestError: nothing in it has a first axis.

    Example:
        >>> size({"input_ids": torch.zeros(3, 5)})
        3
    """
    if not any(isinstance(value, Tensor) and value.dim() for value in batch.values()):
        raise RequestError(
            f"a batch of {', '.join(batch) or 'nothing'}", expected="tensors", do="give encoded examples"
        )
    return examples(batch)


def singles(batch: Mapping[str, Any]) -> Iterator[Batch]:
    """Yield a batch's examples as batches of one; what has no such axis goes to each as it is.

    Example:
        >>> [b["x"].tolist() for b in singles({"x": torch.tensor([[1], [2]]), "flag": True})]
        [[[1]], [[2]]]
    """
    n = size(batch)
    for i in range(n):
        yield {k: v[i : i + 1] if isinstance(v, Tensor) and v.dim() and len(v) == n else v for k, v in batch.items()}


def row_digests(batches: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a short digest of every example's input, the same however it is batched and padded; labels do not count.

    Example:
        >>> a = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> row_digests([a]) == row_digests([{"input_ids": torch.tensor([[5, 6]])}])
        True
    """
    return [_row_digest(one) for batch in batches for one in singles(batch)]


def _row_digest(one: Batch) -> str:
    tokens, attention = tokens_of(one), one.get("attention_mask")
    if tokens is not None:
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if isinstance(attention, Tensor) and attention.shape == real.shape:
            real = attention.bool()
        # The picture a question is about; patches of a whole batch in one row say nothing of this example.
        seen = {n: one[n] for n in BESIDE if isinstance(one.get(n), Tensor) and len(one[n]) == 1}
        return digest(tokens[real], *([seen] if seen else []))[:16]
    return digest({n: one[n] for n in INPUTS if isinstance(one.get(n), Tensor)} or dict(_tensors(one)))[:16]


def _tensors(one: Batch) -> Iterator[tuple[str, Tensor]]:
    return ((k, v) for k, v in one.items() if isinstance(v, Tensor) and k != "labels")
