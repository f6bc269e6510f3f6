"""What tokens a text has behind another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def continued(tokenizer: Any, prompt: str, asked: Sequence[int], said: str) -> tuple[int, ...]:
    """Return the tokens of a text as it stands behind a prompt, whose own tokens are `asked`.

    On its own a text may get other tokens: tokenizers of the SentencePiece kind put a space before its first word.
    Where prompt and text share a token there is no such place, and the text's own tokens are taken.

    Args:
        tokenizer: of the model.
        prompt: what stands before.
        asked: its tokens, without an end.
        said: what stands behind.
    """
    whole = opened(tokenizer(prompt + said)["input_ids"], tokenizer.eos_token_id)
    alone = opened(tokenizer(prompt)["input_ids"], tokenizer.eos_token_id)
    if len(alone) == len(asked) < len(whole) and whole[: len(asked)] == tuple(asked):
        return whole[len(asked) :]
    return tuple(tokenizer(said, add_special_tokens=False)["input_ids"])


def opened(ids: Sequence[int], end: int | None) -> tuple[int, ...]:
    """Return tokens without the end that some tokenizers close every text with."""
    return tuple(ids[:-1] if len(ids) and ids[-1] == end else ids)
