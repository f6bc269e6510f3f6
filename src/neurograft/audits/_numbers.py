"""Which tokens of a vocabulary are numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neurograft.core.errors import RequestError

TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion"
WORDS = frozenset(f"{TEENS} {TENS}".split())
SHAPES = re.compile(r"[0-9]+|[0-9]+(?:st|nd|rd|th)|[0-9]+[.,][0-9]+")
MARKS = "Ġ▁ \u00a0"


def is_number(token: str) -> bool:
    """Say whether a token, its space marker left out, is a number in digits, an ordinal, or an English number word.

    Example:
        >>> [t for t in ("7", "12th", "3.5", " Two", "x7", "²", "often") if is_number(t)]
        ['7', '12th', '3.5', ' Two']
    """
    bare = token.strip(MARKS)
    return bool(SHAPES.fullmatch(bare, 0)) or bare.lower() in WORDS


def token_ids(tokens: Any) -> list[int]:
    """Return token numbers given as such, or the numbers among a tokenizer's vocabulary.

    Raises:
        RequestError: neither, or none.
    """
    if isinstance(tokens, Sequence) and not isinstance(tokens, str):
        found = sorted({int(t) for t in tokens})
    elif isinstance(tokens, Mapping) or callable(getattr(tokens, "get_vocab", None)):
        known = tokens if isinstance(tokens, Mapping) else tokens.get_vocab()
        found = sorted(_numbers(known.items()))
    else:
        found = []
    if not found:
        raise RequestError(
            f"tokens={type(tokens).__name__} without a token",
            expected="token numbers, or a tokenizer whose vocabulary holds numbers",
            do="pass tokens=[...]",
        )
    return found


def _numbers(vocabulary: Iterable[tuple[str, int]]) -> set[int]:
    return {index for token, index in vocabulary if is_number(token)}
