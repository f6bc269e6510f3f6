"""A world of steps: counting, indexing and sums with a written scratchpad, of any difficulty."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from neurograft.core.errors import one_of
from neurograft.core.seeds import generator
from neurograft.worlds.mixture import BOS, DIGIT, EOS, LETTER, MODULUS, SEP, TASK, padded

KINDS = 6  # letters in use, so that a letter comes more than once

# What is given, the steps written on the way, what is to be said.
Worked = tuple[list[int], list[int], list[int]]


def _count(difficulty: int, rng: torch.Generator) -> Worked:
    letters = torch.randint(KINDS, (difficulty,), generator=rng).tolist()
    wanted = letters[0]
    seen, steps = 0, []
    for letter in letters:
        seen += letter == wanted
        steps.append(DIGIT + seen % MODULUS)
    return [LETTER + x for x in (wanted, *letters)], steps, steps[-1:]


def _index(difficulty: int, rng: torch.Generator) -> Worked:
    size = min(difficulty, MODULUS)
    letters = torch.randint(KINDS, (size,), generator=rng).tolist()
    place = int(torch.randint(size, (), generator=rng))
    steps = [token for i in range(place + 1) for token in (DIGIT + i, LETTER + letters[i])]
    return [DIGIT + place, *(LETTER + x for x in letters)], steps, [LETTER + letters[place]]


def _sum(difficulty: int, rng: torch.Generator) -> Worked:
    digits = torch.randint(MODULUS, (difficulty,), generator=rng).tolist()
    total, steps = 0, []
    for digit in digits:
        total = (total + digit) % MODULUS
        steps.append(DIGIT + total)
    return [DIGIT + x for x in digits], steps, steps[-1:]


TASKS: Mapping[str, tuple[int, Callable[[int, torch.Generator], Worked]]] = {
    "count": (5, _count),
    "index": (6, _index),
    "sum": (7, _sum),
}


def steps(
    task: str = "sum",
    *,
    difficulty: int = 4,
    scratchpad: bool = True,
    count: int = 8,
    batch: int = 32,
    wrong: float = 0.0,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Return batches of `<bos> task given <sep> [steps <sep>] answer <eos>` in the vocabulary of `mixture`.

    Args:
        task: "count" how often the first letter comes, "index" the letter at a place, "sum" of digits modulo 10.
        difficulty: letters or digits given.
        scratchpad: write the steps, with labels on them too; without it only the answer has a label.
        count: batches.
        batch: rows.
        wrong: share of rows whose scratchpad is drawn from another problem while the answer stays right, to ask
            whether a model reads its own steps.
        seed: names the rows.

    Example:
        >>> row = steps("sum", difficulty=3, count=1, batch=1)[0]
        >>> given, said = row["input_ids"][0, 2:5] - 12, row["input_ids"][0, 6:9] - 12
        >>> (given.cumsum(0) % 10).tolist() == said.tolist()
        True
    """
    number, work = TASKS[one_of(task, TASKS, what="step task")]
    rng, found = generator(seed, "steps", task, difficulty), []
    for _ in range(count):
        rows = []
        for _ in range(batch):
            given, way, answer = work(difficulty, rng)
            if wrong and float(torch.rand((), generator=rng)) < wrong:
                way = work(difficulty, rng)[1]
            said = [*way, SEP, *answer, EOS] if scratchpad else [*answer, EOS]
            rows.append(([BOS, TASK + number, *given, SEP], said))
        found.append(padded(rows))
    return found
