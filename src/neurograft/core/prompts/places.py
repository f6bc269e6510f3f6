"""Places in a prompt, told from where its answer begins: its end, tokens before it, an earlier mention.

| place | token |
|---|---|
| end | the one that predicts the answer: before the first labelled token, or the last without labels |
| end-2 | two before it |
| mention | the first earlier token like the one at the query, itself a place such as end-2 |
| mention+1 | the one behind that |

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurograft.core.batches import IGNORE, Batch, token_mask
from neurograft.core.errors import RequestError

WORD = re.compile(r"(end|mention)([+-]\d+)?")


@dataclass(frozen=True)
class Placed:
    """Where a place is in each row.

    Args:
        at: position, int64 [B]; -1 where the row has none.
    """

    at: Tensor

    @property
    def found(self) -> Tensor:
        """Which rows have it, bool [B]."""
        return self.at >= 0

    def flags(self, length: int) -> Tensor:
        """Return the places as flags, bool [B, length]."""
        return torch.arange(length, device=self.at.device) == self.at[:, None]


def place(batch: Mapping[str, Any], at: str, *, query: str = "end-2") -> Placed:
    """Return where a place is in each row of a batch.

    Args:
        batch: input_ids [B, T], and labels and attention_mask if there are some.
        at: the place; see the table above.
        query: the place whose token a mention is like.

    Raises:
        RequestError: a word that is no place, or a batch without tokens.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 9, 6, 8, 5, 1]])}
        >>> [place(batch, at, query="end-1").at.item() for at in ("end", "end-2", "mention", "mention+1", "end-9")]
        [5, 3, 0, 1, -1]
    """
    known = WORD.fullmatch(at)
    if known is None or (known[1] == "end" and int(known[2] or 0) > 0):
        raise RequestError(f"the place {at!r}", expected="end, end-2, mention, mention+1 ...", do="write it like these")
    shift, finish = int(known[2] or 0), ends(batch)
    if known[1] == "end":
        return Placed(on_tokens(batch, finish + shift))
    if query.startswith("mention"):
        raise RequestError(f"query={query!r}", expected="a place counted from the end", do="query='end-2'")
    tokens, asked = batch["input_ids"], place(batch, query).at
    index = torch.arange(tokens.shape[1], device=tokens.device)
    like = tokens == tokens.gather(1, asked.clamp(min=0)[:, None])
    like &= (index < asked[:, None]) & _real(batch)
    first = torch.where(like, index, tokens.shape[1]).min(1).values
    found = like.any(1) & (first + shift >= 0) & (first + shift <= finish)
    return Placed(on_tokens(batch, torch.where(found, first + shift, -1)))


def on_tokens(batch: Mapping[str, Any], at: Tensor) -> Tensor:
    """Return positions int64 [B], -1 for those before a row's first token or at its padding.

    Example:
        >>> batch = {"input_ids": torch.ones(3, 2), "attention_mask": torch.tensor([[0, 1], [0, 1], [1, 1]])}
        >>> on_tokens(batch, torch.tensor([1, 0, -1])).tolist()
        [1, -1, -1]
    """
    real = _real(batch).gather(1, at.clamp(min=0)[:, None])[:, 0]
    return torch.where((at >= 0) & real, at, -1)


def ends(batch: Mapping[str, Any]) -> Tensor:
    """Return the token that predicts each row's answer, int64 [B]."""
    real, labels = _real(batch), batch.get("labels")
    index = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, index, -1).max(1).values
    if labels is None or tuple(labels.shape) != tuple(real.shape):
        return last
    asked = (labels[:, 1:] != IGNORE) & real[:, 1:]
    first = torch.where(asked, index[:-1], real.shape[1]).min(1).values
    return torch.where(asked.any(1), first, last)


def answers(batch: Mapping[str, Any]) -> Tensor:
    """Return the first token of each row's answer, int64 [B].

    Raises:
        RequestError: a row without an answer behind its prompt.

    Example:
        >>> answers({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, -100, 7]])}).tolist()
        [7]
    """
    labels, finish = batch.get("labels"), ends(batch)
    width = batch["input_ids"].shape[1]
    if not isinstance(labels, Tensor) or labels.dim() != 2 or bool((finish + 1 >= width).any()):
        raise RequestError("prompts without an answer", expected="labels [B, T]", do="give prompt/completion rows")
    found = labels.gather(1, finish[:, None] + 1)[:, 0]
    if bool((found == IGNORE).any()):
        raise RequestError(
            f"row {int((found == IGNORE).nonzero()[0])}, which has no answer", expected="a completion", do="drop it"
        )
    return found


def rows_of(batch: Mapping[str, Any], keep: Tensor) -> Batch:
    """Return some rows of a batch; `keep` holds their numbers, int64 [k]."""
    n = len(batch["input_ids"])
    return {
        k: v[keep.to(v.device)] if isinstance(v, Tensor) and v.dim() and len(v) == n else v for k, v in batch.items()
    }


def _real(batch: Mapping[str, Any]) -> Tensor:
    if not isinstance(batch.get("input_ids"), Tensor):
        raise RequestError("a batch without input_ids", expected="texts", do="give prompts of a language model")
    found = token_mask({k: v for k, v in batch.items() if v is not None}, "all")
    assert found is not None
    return found
