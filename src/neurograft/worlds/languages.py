"""Markov languages: chains with no step in common, over words of their own and words that all share."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.errors import one_of
from neurograft.core.seeds import generator

FIRST, OWN, SHARED = 4, 14, 15  # the first word; words that one language has alone; words of all
NAMES = ("ada", "bel", "cor")
CHANCES = (0.6, 0.3, 0.1)


def languages(
    name: str, *, count: int = 8, batch: int = 32, length: int = 16, world: int = 0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Return batches of sentences of a language, every token labelled.

    After each word a language has three words, at 0.6, 0.3 and 0.1; no other language has any of them after it.

    Args:
        name: one of `NAMES`.
        count: batches.
        batch: rows.
        length: words a row.
        world: names the three grammars.
        seed: names the sentences.

    Example:
        >>> a, b = (languages(n, count=1)[0]["input_ids"] for n in ("ada", "bel"))
        >>> steps = [set(zip(x[:, :-1].flatten().tolist(), x[:, 1:].flatten().tolist())) for x in (a, b)]
        >>> len(steps[0] & steps[1])
        0
    """
    me = NAMES.index(one_of(name, NAMES, what="language"))
    after, mine = _grammar(me, world)
    rng, found = generator(seed, "languages", name, world), []
    for _ in range(count):
        words = [mine[torch.randint(len(mine), (batch,), generator=rng)]]
        for _ in range(length - 1):
            drawn = torch.multinomial(torch.tensor(CHANCES), batch, replacement=True, generator=rng)
            words.append(after[words[-1], drawn])
        tokens = torch.stack(words, 1)
        found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()})
    return found


def _grammar(me: int, world: int) -> tuple[Tensor, Tensor]:
    """Return the three words after each word, int64 [V, 3], and the words of the language."""
    total = FIRST + len(NAMES) * OWN + SHARED
    own = FIRST + me * OWN + torch.arange(OWN)
    shared = torch.arange(total - SHARED, total)
    after = torch.zeros(total, len(CHANCES), dtype=torch.int64)
    for word in torch.cat([own, shared]).tolist():
        # A permutation that all languages draw alike deals each its own part of the shared words.
        common = shared[torch.randperm(SHARED, generator=generator(world, "shared", word))].chunk(len(NAMES))[me]
        mine = torch.cat([own, common])
        after[word] = mine[torch.randperm(len(mine), generator=generator(world, "after", me, word))[: len(CHANCES)]]
    return after, torch.cat([own, shared])
