"""Sentence-pair like tasks for tiny encoders: masked tokens to restore, and classes to tell apart."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.context import IGNORE
from neurograft.core.errors import one_of
from neurograft.core.seeds import generator
from neurograft.worlds.mixture import BOS, EOS, LETTER, LETTERS, SEP

MASK = 11
CLASSES = {"relation": 3, "order": 2, "majority": 3}


def pairs(
    task: str = "relation", *, count: int = 8, batch: int = 32, length: int = 4, noise: float = 0.0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Return batches of `<bos> a <sep> b <eos>`, where b is a again, a backwards, or another text.

    Args:
        task: "masked": restore masked tokens, labels [B, T] (never of the third kind of pair, which cannot be
            guessed); "relation": which of the three, labels [B]; "order": is the first letter of a before the
            first of b; "majority": in which third of the alphabet most letters of a are, ties to the earlier.
        count: batches.
        batch: rows.
        length: letters of each half.
        noise: share of class labels drawn at random.
        seed: names the rows.

    Example:
        >>> pairs("order", count=1, batch=2)[0]["labels"].shape
        torch.Size([2])
    """
    one_of(task, ("masked", *CLASSES), what="pair task")
    rng, found = generator(seed, "pairs", task, length), []
    for _ in range(count):
        a = torch.randint(LETTERS, (batch, length), generator=rng)
        kind = torch.randint(2 if task == "masked" else 3, (batch,), generator=rng)
        other = torch.randint(LETTERS, (batch, length), generator=rng)
        b = torch.where(kind[:, None] == 0, a, torch.where(kind[:, None] == 1, a.flip(1), other))
        one = torch.ones(batch, 1, dtype=torch.int64)
        tokens = torch.cat([one * BOS, a + LETTER, one * SEP, b + LETTER, one * EOS], dim=1)
        made = {"attention_mask": torch.ones_like(tokens)}
        if task == "masked":
            hidden = (torch.rand(tokens.shape, generator=rng) < 0.25) & (tokens >= LETTER)
            made |= {"input_ids": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, IGNORE)}
        else:
            labels = _class(task, a, b, kind)
            wrong = torch.rand(batch, generator=rng) < noise
            drawn = torch.randint(CLASSES[task], (batch,), generator=rng)
            made |= {"input_ids": tokens, "labels": torch.where(wrong, drawn, labels)}
        found.append(made)
    return found


def _class(task: str, a: Tensor, b: Tensor, kind: Tensor) -> Tensor:
    if task == "relation":
        return kind
    if task == "order":
        return (a[:, 0] < b[:, 0]).long()
    thirds = torch.nn.functional.one_hot(a * 3 // LETTERS, 3).sum(1)
    return thirds.argmax(-1)
