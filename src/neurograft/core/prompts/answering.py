"""What a causal language model answers to a batch of prompts, and prompts that come in pairs.

Shape letters: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch, shifts
from neurograft.core.errors import RequestError
from neurograft.core.prompts.places import Placed, answers, ends, rows_of
from neurograft.core.running import run


def need_causal(model: nn.Module) -> None:
    """Refuse models in which a token sees what comes after it."""
    if not shifts(model):
        raise RequestError(
            type(model).__name__, expected="a causal language model", do="load it with AutoModelForCausalLM"
        )


@torch.no_grad()
def said(model: nn.Module, batch: Batch) -> Tensor:
    """Return log-probabilities at the end of each prompt, float64 [B, V].

    Raises:
        RequestError: the model is no causal language model.
    """
    need_causal(model)
    logits = run(model, batch).logits
    finish = ends(batch).to(logits.device)
    found: Tensor = logits[torch.arange(len(finish), device=logits.device), finish].double().log_softmax(-1)
    return found


def credit(model: nn.Module, batch: Batch, metric: str) -> Tensor:
    """Return each row's credit, float64 [B]: whether its answer is the likeliest token, or its probability."""
    logp, answer = said(model, batch), answers(batch)
    if metric == "accuracy":
        return (logp.argmax(-1) == answer.to(logp.device)).double()
    return logp.gather(1, answer.to(logp.device)[:, None])[:, 0].exp()


def paired(clean: Sequence[Batch], other: Sequence[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Yield batches side by side.

    Raises:
        RequestError: they are not row for row the same number.
    """
    sizes = [[len(b["input_ids"]) for b in side] for side in (clean, other)]
    if sizes[0] != sizes[1] or not sizes[0]:
        raise RequestError(
            f"batches of {sizes[0][:4]} and {sizes[1][:4]} prompts",
            expected="a second prompt for each prompt",
            do="give rows with `positive` and `negative`",
        )
    yield from zip(clean, other)


def both(clean: Batch, other: Batch, at: Placed, there: Placed) -> tuple[Batch, Batch, Tensor, Tensor]:
    """Return two batches cut to the rows that have both places, and these places."""
    keep = (at.found & there.found.to(at.found.device)).nonzero()[:, 0]
    return rows_of(clean, keep), rows_of(other, keep), at.at[keep], there.at[keep.to(there.at.device)]
