"""Edit requests as tokens: what is asked, where its key stands, what is to be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neurograft.core.batches import IGNORE, Batch


@dataclass(frozen=True)
class Request:
    """One fact that is to change.

    Args:
        prompts: token lists of the prompt, the bare one first, then behind each context.
        at: for each prompt, the position of its subject's last token.
        target: the tokens to be said next.
        end: token that ends an answer, or None.
        source: the request as it was given.
    """

    prompts: tuple[tuple[int, ...], ...]
    at: tuple[int, ...]
    target: tuple[int, ...]
    end: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for cards: the words, and the tokens from which its keys can be read again."""
        words = {k: self.source[k] for k in ("prompt", "subject", "target_new") if k in self.source}
        return {**words, "tokens": list(self.prompts[0]), "at": self.at[0], "target": list(self.target)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Request:
        """Read what `as_dict` wrote: the bare prompt alone."""
        return Request((tuple(data["tokens"]),), (int(data["at"]),), tuple(data["target"]), None, dict(data))


@dataclass(frozen=True)
class Rows:
    """Requests side by side, right-padded, each prompt followed by its target.

    Args:
        batch: `input_ids`, `attention_mask`, `labels` on the targets, [rows, T].
        at: position of the subject's last token, int64 [rows].
        last: position of the prompt's last token, int64 [rows].
        owner: which request a row belongs to, int64 [rows].
    """

    batch: Batch
    at: Tensor
    last: Tensor
    owner: Tensor

    def mean(self, values: Tensor, n: int) -> Tensor:
        """Return the mean over each request's rows, [n, ...], of values [rows, ...]."""
        total = torch.zeros(n, *values.shape[1:], dtype=values.dtype, device=values.device)
        counts = torch.bincount(self.owner, minlength=n).to(values)
        return total.index_add(0, self.owner, values) / counts.reshape(-1, *[1] * (values.dim() - 1))


def joined(requests: Sequence[Request], *, eos: bool = False, pad: int = 0, device: torch.device | str = "cpu") -> Rows:
    """Return every prompt of the requests with its target behind it, as one batch.

    Args:
        requests: at least one.
        eos: whether the token that ends an answer belongs to the target.
        pad: token to fill up with.
        device: where the tensors go.

    Example:
        >>> rows = joined([Request(((5, 6),), (0,), (7,), 1)], eos=True)
        >>> rows.batch["input_ids"].tolist(), rows.batch["labels"].tolist(), rows.last.tolist()
        ([[5, 6, 7, 1]], [[-100, -100, 7, 1]], [1])
    """
    flat = [(i, p, a, r) for i, r in enumerate(requests) for p, a in zip(r.prompts, r.at)]
    tails = [(*r.target, r.end) if eos and r.end is not None else r.target for _, _, _, r in flat]
    longest = max(len(p) + len(t) for (_, p, _, _), t in zip(flat, tails))
    tokens = torch.full((len(flat), longest), pad)
    attention, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORE)
    for row, ((_, prompt, _, _), tail) in enumerate(zip(flat, tails)):
        whole = torch.tensor([*prompt, *tail])
        tokens[row, : len(whole)], attention[row, : len(whole)] = whole, 1
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    batch = {"input_ids": tokens, "attention_mask": attention, "labels": labels}
    places = [torch.tensor(x, device=device) for x in zip(*[(a, len(p) - 1, i) for i, p, a, _ in flat])]
    return Rows({k: v.to(device) for k, v in batch.items()}, *places)
