"""A world of facts: subjects, relations and objects in several phrasings, with exact answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE
from neurograft.core.errors import RequestError
from neurograft.core.seeds import derive, generator
from neurograft.worlds.mixture import BOS, EOS, SEP, padded
from neurograft.worlds.tiny import fit, llama

FIRST = 4  # after the special tokens
WORDS = 12


@dataclass(frozen=True)
class Facts:
    """Every subject has one object for every relation; the first `known` subjects are what a base learns.

    A question is `<bos> words subject words relation words <sep>`, its answer `object <eos>`; a phrasing is a
    choice of words and of the order of subject and relation.

    Args:
        objects: int64 [subjects, relations], the number of each fact's object.
        kinds: how many objects there are.
        known: how many subjects a base learns.
        phrasings: how many phrasings.
        seed: names them.
    """

    objects: Tensor
    kinds: int
    known: int
    phrasings: int
    seed: int = 0

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        subjects, relations = self.objects.shape
        return FIRST + WORDS + relations + subjects + self.kinds

    def token(self, objects: Tensor) -> Tensor:
        """Return the tokens of objects."""
        return objects + self.vocabulary - self.kinds

    def rows(
        self, subjects: Sequence[int] | range, *, phrasings: Sequence[int] = (0,)
    ) -> list[tuple[list[int], list[int]]]:
        """Return (question, answer) token lists of every relation of the subjects in every phrasing."""
        relations = range(self.objects.shape[1])
        said = self.token(self.objects)
        return [
            (self._question(s, r, p), [int(said[s, r]), EOS]) for p in phrasings for s in subjects for r in relations
        ]

    def batches(
        self,
        subjects: Sequence[int] | range,
        *,
        phrasings: Sequence[int] = (0,),
        count: int | None = None,
        batch: int = 32,
        noise: float = 0.0,
        seed: int = 0,
    ) -> list[dict[str, Tensor]]:
        """Return labelled batches of facts.

        Args:
            subjects: whose facts.
            phrasings: in which phrasings.
            count: so many batches of rows drawn at random; None for every row once, in order.
            batch: rows.
            noise: share of rows with a random object for an answer.
            seed: names the draw.
        """
        rows = self.rows(subjects, phrasings=phrasings)
        rng = generator(self.seed, "facts.batches", seed)
        if count is not None:
            rows = [rows[i] for i in torch.randint(len(rows), (count * batch,), generator=rng).tolist()]
        if noise:
            wrong = torch.rand(len(rows), generator=rng) < noise
            other = self.token(torch.randint(self.kinds, (len(rows),), generator=rng)).tolist()
            rows = [(q, [other[i], EOS] if wrong[i] else a) for i, (q, a) in enumerate(rows)]
        return [padded(rows[i : i + batch]) for i in range(0, len(rows), batch)]

    def changed(self, subjects: Sequence[int] | range, *, seed: int = 0) -> Facts:
        """Return the world in which every fact of these subjects has another object."""
        rng, objects = generator(self.seed, "facts.changed", seed), self.objects.clone()
        for subject in subjects:
            step = torch.randint(1, self.kinds, (objects.shape[1],), generator=rng)
            objects[subject] = (objects[subject] + step) % self.kinds
        return replace(self, objects=objects)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, subjects: Sequence[int] | range, *, phrasings: Sequence[int] = (0,)) -> float:
        """Return the share of facts whose object is the likeliest next token."""
        hits = []
        for batch in self.batches(subjects, phrasings=phrasings, batch=64):
            labels = batch["labels"]
            at = (labels != IGNORE).int().argmax(1)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            rows = torch.arange(len(at))
            hits.append((logits[rows, at - 1].argmax(-1) == labels[rows, at]).float())
        return float(torch.cat(hits).mean())

    def base(self, *, steps: int = 150, seed: int = 0, **config: Any) -> nn.Module:
        """Return a tiny Llama trained in seconds on the facts of the known subjects, in every phrasing but the last.

        Args:
            steps: of 64 questions.
            seed: names weights and order.
            **config: fields of the config.
        """
        model = llama(seed, vocab_size=self.vocabulary, **{"num_hidden_layers": 2, **config})
        phrasings = range(max(1, self.phrasings - 1))
        data = self.batches(
            range(self.known), phrasings=phrasings, count=steps, batch=64, seed=derive(seed, "facts.base")
        )
        return fit(model, data, lr=5e-3)

    def _question(self, subject: int, relation: int, phrasing: int) -> list[int]:
        if phrasing >= self.phrasings:
            raise RequestError(f"phrasing {phrasing}", expected=f"0 to {self.phrasings - 1}", do="ask in another one")
        rng = generator(self.seed, "facts.phrasing", phrasing)
        words = (torch.randperm(WORDS, generator=rng)[:3] + FIRST).tolist()
        r = FIRST + WORDS + relation
        s = FIRST + WORDS + self.objects.shape[1] + subject
        first, second = (s, r) if phrasing % 2 == 0 else (r, s)
        return [BOS, words[0], first, words[1], second, words[2], SEP]


def facts(
    *, subjects: int = 48, relations: int = 2, kinds: int = 24, known: int = 32, phrasings: int = 4, seed: int = 0
) -> Facts:
    """Draw a world of facts.

    Args:
        subjects: how many.
        relations: how many facts each has.
        kinds: how many objects there are.
        known: how many subjects, from the first, a base learns.
        phrasings: how many; the last is kept from the base's training.
        seed: names everything.

    Example:
        >>> world = facts()
        >>> new = world.changed([0, 1])
        >>> [bool((new.objects[s] != world.objects[s]).all()) for s in (0, 1, 2)]
        [True, True, False]
    """
    if not 0 < known <= subjects:
        raise RequestError(f"known={known} of {subjects} subjects", expected="1 to all", do="give fewer known")
    drawn = torch.randint(kinds, (subjects, relations), generator=generator(seed, "facts", "objects"))
    return Facts(drawn, kinds, known, phrasings, seed)
