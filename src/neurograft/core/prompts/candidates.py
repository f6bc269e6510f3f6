"""A few candidate tokens where an answer begins: which they are, and how probable a model finds each.

Shape letters: B rows, n candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurograft.core.batches import IGNORE, Batch
from neurograft.core.errors import RequestError
from neurograft.core.numerics.entropies import relative_entropy


def first_answers(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return where each row's first labelled token behind another one stands, and that token, int64 [B] each.

    Raises:
        RequestError: a row without one.
    """
    labels = batch.get("labels")
    marks = None if labels is None or labels.dim() != 2 else labels != IGNORE
    if labels is None or marks is None or not bool(marks[:, 1:].any(1).all()):
        raise RequestError(
            "rows without a labelled answer behind a prompt",
            expected="the candidates as completions of prompts",
            do="give prompt/completion rows",
        )
    at = marks[:, 1:].int().argmax(1) + 1
    return at, labels.gather(1, at[:, None])[:, 0]


def candidate_ids(batches: Sequence[Batch], given: Sequence[str | int], processor: Any) -> Tensor:
    """Return the candidates' token ids, int64 [n]: those given, or the distinct first tokens of the data's answers.

    Raises:
        RequestError: fewer than two, a word of several tokens, or a word and no tokenizer.
    """
    if not given:
        found = torch.cat([first_answers(b)[1] for b in batches]).unique().cpu()
    else:
        found = torch.tensor([w if isinstance(w, int) else _single(w, processor) for w in given])
    if len(found) < 2 or len(found.unique()) != len(found):
        raise RequestError(
            f"the candidates {list(given) or found.tolist()}",
            expected="at least two different tokens",
            do="name the words of all groups, or give rows that answer with each of them",
        )
    return found


def _single(word: str, processor: Any) -> int:
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = [] if tokenizer is None else tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise RequestError(
            f"the candidate {word!r}, " + ("and no tokenizer" if tokenizer is None else f"which is {len(ids)} tokens"),
            expected="words of one token each",
            do="pass processing_class=, or choose words the vocabulary has whole (mind the leading space)",
        )
    return int(ids[0])


def candidate_logits(logits: Tensor, batch: Batch, ids: Tensor) -> Tensor:
    """Return the candidates' logits where each row's answer begins, float [B, n], with gradient."""
    at, _ = first_answers(batch)
    rows = torch.arange(len(at), device=logits.device)
    found: Tensor = logits[rows, at.to(logits.device) - 1][:, ids.to(logits.device)]
    return found if found.dtype == torch.float64 else found.float()


def entropy(logits: Tensor) -> Tensor:
    """Return the Shannon entropy in nats of softmax over the last axis.

    Example:
        >>> round(float(entropy(torch.zeros(2)).exp()), 4)
        2.0
    """
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def divergence(logits: Tensor) -> Tensor:
    """Return mean_g KL(q_g || mean q) of distributions [..., G, n], the Jensen-Shannon divergence of any number.

    Example:
        >>> round(float(divergence(torch.tensor([[50.0, 0.0], [0.0, 50.0]])).exp()), 4)
        2.0
    """
    logq = logits.log_softmax(-1)
    middle = torch.logsumexp(logq, -2, keepdim=True) - torch.tensor(float(logits.shape[-2])).log().to(logq)
    return relative_entropy(logq, middle).mean(-1)
