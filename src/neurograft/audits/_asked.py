"""Putting prompts to a causal language model: which of two answers it prefers, and what it replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import device_of
from neurograft.core.errors import RequestError


@torch.no_grad()
def preferred(
    model: nn.Module, prompts: Sequence[list[int]], answers: tuple[int, int], *, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Return whether the first answer's token is likelier than the second's, and what both are worth together.

    Where either is the likeliest token this is what greedy decoding says.

    Args:
        model: left as found; in evaluation mode.
        prompts: their tokens.
        answers: first tokens of the two answers.
        batch_size: prompts in a batch.

    Returns:
        Boolean [N], and the sum of the two probabilities, float64 [N].
    """
    _room(model, prompts, 1)
    won, mass = [], []
    for start in range(0, len(prompts), batch_size):
        tokens, mask = padded(prompts[start : start + batch_size], device_of(model), left=False)
        logits = model(input_ids=tokens, attention_mask=mask).logits
        last = mask.sum(1) - 1
        at = logits[torch.arange(len(last), device=logits.device), last.to(logits.device)].double()
        won.append((at[:, answers[0]] > at[:, answers[1]]).cpu())
        mass.append(at.softmax(-1)[:, list(answers)].sum(1).cpu())
    return torch.cat(won), torch.cat(mass)


@torch.no_grad()
def replies(model: nn.Module, prompts: Sequence[list[int]], *, length: int, batch_size: int = 32) -> list[list[int]]:
    """Return what a model says greedily after each prompt, up to its end token, at most `length` tokens.

    Args:
        model: left as found; in evaluation mode.
        prompts: their tokens.
        length: tokens at most.
        batch_size: prompts in a batch.
    """
    _room(model, prompts, length)
    generate: Any = model.generate
    ends, found = _ends(model), []
    for start in range(0, len(prompts), batch_size):
        tokens, mask = padded(prompts[start : start + batch_size], device_of(model), left=True)
        made = generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            pad_token_id=ends[0] if ends else 0,
        )
        for row in made[:, tokens.shape[1] :].tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            found.append(row[:stop])
    return found


def padded(prompts: Sequence[list[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return prompts as one batch and its mask, int64 [B, T], padded with 0 on one side."""
    width = max(len(p) for p in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        where = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        tokens[i, where], mask[i, where] = torch.tensor(prompt), 1
    return tokens.to(device), mask.to(device)


def _ends(model: nn.Module) -> list[int]:
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    end = getattr(config, "eos_token_id", None)
    return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [int(end)]


def _room(model: nn.Module, prompts: Sequence[list[int]], length: int) -> None:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    places, longest = getattr(text, "max_position_embeddings", None), max(len(p) for p in prompts)
    if places is not None and longest + length > places:
        raise RequestError(
            f"a prompt of {longest} tokens and a reply of {length} for a model of {places} places",
            expected="both to fit",
            do="ask for shorter replies (length=), shorten the scenarios, or take a model with a longer context",
        )
