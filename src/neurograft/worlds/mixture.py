"""Small sequence tasks over one vocabulary of 64 tokens: what tiny decoders and encoders learn in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from neurograft.core.context import IGNORE, unlabelled
from neurograft.core.errors import one_of
from neurograft.core.seeds import generator

PAD, BOS, EOS, SEP = range(4)
TASK, DIGIT, LETTER, VOCABULARY = 4, 12, 22, 64
MODULUS, LETTERS = 10, VOCABULARY - LETTER

Row = tuple[list[int], list[int]]  # what is given, what is to be said


def _letters(length: int, rng: torch.Generator, kinds: int = LETTERS) -> list[int]:
    return [LETTER + x for x in torch.randint(kinds, (length,), generator=rng).tolist()]


def copy(length: int, rng: torch.Generator) -> Row:
    """Say the letters again."""
    given = _letters(length, rng)
    return given, given


def reverse(length: int, rng: torch.Generator) -> Row:
    """Say the letters backwards."""
    given = _letters(length, rng)
    return given, given[::-1]


def sort(length: int, rng: torch.Generator) -> Row:
    """Say the letters in order."""
    given = _letters(length, rng)
    return given, sorted(given)


def shift(length: int, rng: torch.Generator) -> Row:
    """Say the letter after each letter."""
    given = _letters(length, rng)
    return given, [LETTER + (g - LETTER + 1) % LETTERS for g in given]


def add(length: int, rng: torch.Generator) -> Row:
    """Say the sum of two digits, modulo 10."""
    a, b = torch.randint(MODULUS, (2,), generator=rng).tolist()
    return [DIGIT + a, DIGIT + b], [DIGIT + (a + b) % MODULUS]


def count(length: int, rng: torch.Generator) -> Row:
    """Say as a digit how often the first letter comes again; few kinds of letters, so that it does."""
    given = _letters(length + 1, rng, kinds=3)
    return given, [DIGIT + given[1:].count(given[0])]


def first(length: int, rng: torch.Generator) -> Row:
    """Say as a digit in which third of the alphabet the first letter is."""
    given = _letters(length, rng)
    return given, [DIGIT + (given[0] - LETTER) * 3 // LETTERS]


TASKS: Mapping[str, Callable[[int, torch.Generator], Row]] = {
    f.__name__: f for f in (copy, reverse, add, sort, shift, count, first)
}
DIGITS = tuple(range(DIGIT, DIGIT + MODULUS))


def mixture(
    tasks: Sequence[str] = ("copy", "reverse", "add"),
    *,
    count: int = 8,
    batch: int = 32,
    length: int = 4,
    noise: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Return batches of `<bos> task given <sep> answer <eos>`, right-padded, with labels on answer and end alone.

    Args:
        tasks: from `TASKS`, drawn evenly; the answers of "add", "count" and "first" are digits only.
        count: batches.
        batch: rows.
        length: letters given.
        noise: share of rows whose answer is replaced by random tokens of the same kinds.
        seed: names the rows.

    Example:
        >>> rows = mixture(("copy",), count=1, batch=2, length=3)[0]
        >>> rows["input_ids"].shape, int((rows["labels"] != -100).sum())
        (torch.Size([2, 10]), 8)
    """
    numbers = {name: n for n, name in enumerate(TASKS)}
    for name in tasks:
        one_of(name, TASKS, what="task")
    rng, found = generator(seed, "mixture", *tasks, length), []
    for _ in range(count):
        rows = []
        for pick in torch.randint(len(tasks), (batch,), generator=rng).tolist():
            given, said = TASKS[tasks[pick]](length, rng)
            if noise and float(torch.rand((), generator=rng)) < noise:
                said = [_other(token, rng) for token in said]
            rows.append(([BOS, TASK + numbers[tasks[pick]], *given, SEP], [*said, EOS]))
        found.append(padded(rows))
    return found


def _other(token: int, rng: torch.Generator) -> int:
    low, kinds = (DIGIT, MODULUS) if token < LETTER else (LETTER, LETTERS)
    return low + int(torch.randint(kinds, (), generator=rng))


def padded(rows: Sequence[tuple[list[int], list[int]]], *, pad: int = PAD) -> dict[str, Tensor]:
    """Return (prompt, answer) rows as one right-padded batch, labels on the answers alone.

    Example:
        >>> padded([([5, 6], [7]), ([5], [7])])["labels"].tolist()
        [[-100, -100, 7], [-100, 7, -100]]
    """
    width = max(len(p) + len(a) for p, a in rows)
    tokens = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORE)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def exact(model: torch.nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """Return the share of rows whose labelled tokens are all the likeliest ones, given those before."""
    hits = []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        likeliest = model(**unlabelled(batch)).logits[:, :-1].argmax(-1)
        hits.append(((likeliest == labels) | (labels == IGNORE)).all(-1).float())
    return float(torch.cat(hits).mean())
