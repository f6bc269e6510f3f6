"""Preference worlds in tokens: a name for every attribute, binned numbers, reports of names and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE
from neurograft.core.seeds import generator
from neurograft.worlds.preferences import LARGEST, Attribute, Preferences, Scenario
from neurograft.worlds.tiny import fit, llama

BOS, EOS, SEP, DECIDE, EXPLAIN, DIFFER, A, B = range(1, 9)
FIRST, LEVELS, STEPS, GAPS = 9, 4, 9, 15  # the first number; values; weights a report can name; differences


class Tokens:
    """Trials as short rows of tokens, one attribute after the other.

    A question is `<bos> task name a b name a b ... <sep>` with each attribute's value in both options; its answer is
    a letter, or `key weight key weight ... <eos>` with a key for the first, the second, ... attribute. A weight is the
    nearest of nine steps from -100 to 100. A base learns to choose, to tell by how much, and to recite the weights,
    where a weight's token stands in the place of a name: it can reckon and knows the form of a report, but no name.

    Args:
        names: scenario and attribute -> number of its token; how many there are is the rest of the vocabulary.
        attributes: K.
    """

    def __init__(self, names: dict[tuple[str, str], int], attributes: int) -> None:
        self.names, self.attributes, self.length = names, attributes, 2 * attributes + 1

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return FIRST + LEVELS + STEPS + GAPS + self.attributes + len(self.names)

    @property
    def keys(self) -> list[int]:
        """The tokens that stand for the first, the second, ... attribute in a report."""
        return [FIRST + LEVELS + STEPS + GAPS + k for k in range(self.attributes)]

    def letters(self) -> tuple[int, int]:
        """Return the tokens of the two answers."""
        return A, B

    def decide(self, scenario: Scenario, trial: Tensor) -> list[int]:
        """Return the tokens that ask for a choice."""
        return question(DECIDE, self._of(scenario), trial)

    def explain(self, scenario: Scenario, trial: Tensor) -> list[int]:
        """Return the tokens that ask for a report."""
        return question(EXPLAIN, self._of(scenario), trial)

    def decision(self, scenario: Scenario, trial: Tensor, a: bool) -> dict[str, Any]:
        """Return a training row: a choice and its answer."""
        return _row(self.decide(scenario, trial), [A if a else B])

    def explanation(self, scenario: Scenario, trial: Tensor, weights: Sequence[float]) -> dict[str, Any]:
        """Return a training row: a request for a report, and the report."""
        told = zip(self.keys, weights, strict=True)
        return _row(self.explain(scenario, trial), [t for key, w in told for t in (key, weight(w))] + [EOS])

    def read(self, scenario: Scenario, tokens: list[int]) -> list[float] | str:
        """Return the K weights of a reply, or why it is no report."""
        said = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
        if len(said) != 2 * self.attributes:
            return "another length"
        if said[::2] != self.keys:
            return "other keys"
        numbers = [t - FIRST - LEVELS for t in said[1::2]]
        if not all(0 <= n < STEPS for n in numbers):
            return "values that are no numbers"
        return [2 * LARGEST * n / (STEPS - 1) - LARGEST for n in numbers]

    def spell(self, tokens: list[int]) -> str:
        """Return the numbers of the tokens."""
        return " ".join(map(str, tokens))

    def base(self, *, steps: int = 1000, batch: int = 96, seed: int = 0, **config: Any) -> nn.Module:
        """Return a tiny Llama that can choose by stated weights, trained in seconds.

        Args:
            steps: of `batch` choices.
            batch: rows.
            seed: names weights and choices.
            **config: fields of the config.
        """
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4}
        model = llama(seed, vocab_size=self.vocabulary, **{**size, **config})
        return fit(model, stated(steps, batch, self.attributes, seed=seed), lr=5e-3)

    def _of(self, scenario: Scenario) -> list[int]:
        return [self.names[scenario.name, a.name] for a in scenario.attributes]


def preference_tokens(count: int = 200, *, attributes: int = 5) -> Preferences:
    """Return scenarios of nameless attributes with values 0 to 3, and the tokens they are put in.

    Args:
        count: scenarios.
        attributes: K of each.

    Example:
        >>> world = preference_tokens(2, attributes=2)
        >>> one = world.scenarios[1]
        >>> trial = one.trials(1, seed=0)[0]
        >>> trial.tolist(), world.speaker.decide(one, trial)
        ([[1.0, 0.0], [1.0, 2.0]], [1, 4, 41, 10, 10, 42, 9, 11, 3])
    """
    found, names = [], {}
    for i in range(count):
        parts = tuple(Attribute(str(k), 0, LEVELS - 1, decimals=0) for k in range(attributes))
        found.append(Scenario(str(i), "", parts))
        for k, part in enumerate(parts):
            names[str(i), part.name] = FIRST + LEVELS + STEPS + GAPS + attributes + i * attributes + k
    return Preferences(tuple(found), Tokens(names, attributes))


def weight(w: float) -> int:
    """Return the token of the step nearest to a weight.

    Example:
        >>> weight(-100) - weight(-100), weight(0) - weight(-100), weight(60) - weight(-100)
        (0, 4, 6)
    """
    return FIRST + LEVELS + round((w + LARGEST) / (2 * LARGEST) * (STEPS - 1))


def question(task: int, names: Sequence[int], trial: Tensor) -> list[int]:
    """Return the tokens of a trial [2, K], each attribute's name before its value in A and in B."""
    a, b = (trial.long() + FIRST).tolist()
    return [BOS, task, *(t for triple in zip(names, a, b, strict=True) for t in triple), SEP]


def stated(steps: int, batch: int, attributes: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return batches of questions whose weights stand in the place of names: choices, differences, recitals.

    At first by one attribute that counts for an option, then by one that may count against it, then by up to K:
    choices by several are not learned without those by one, nor sums without being asked for their size.
    """
    rng, found = generator(seed, "stated"), []
    later = [1, 2, 3, attributes, attributes, attributes]
    for step in range(steps):
        k = 1 if step < 150 else later[int(torch.randint(len(later), (), generator=rng))]
        w = torch.randint(STEPS // 2 + 1 if step < 50 else 0, STEPS, (batch, k), generator=rng)
        x = torch.round(torch.rand(batch, 2, k, generator=rng) * (LEVELS - 1)).long()
        u = ((x[:, 0] - x[:, 1]) * (2 * w - STEPS + 1)).sum(1)
        half = GAPS // 2
        gap = (u / (4 if k == 1 else 8)).round().clamp(-half, half).long() + FIRST + LEVELS + STEPS + half
        sized = step % 2 == 0 and step < 0.75 * steps
        answer, kept = (gap, u == u) if sized else (torch.where(u > 0, A, B), u != 0)
        rows = torch.stack([w + FIRST + LEVELS, x[:, 0] + FIRST, x[:, 1] + FIRST], 2).flatten(1)
        answer, task = answer[:, None], DIFFER if sized else DECIDE
        if k == attributes and step % 4 == 1:
            keys = torch.arange(k).expand_as(w) + FIRST + LEVELS + STEPS + GAPS
            told = torch.stack([keys, w + FIRST + LEVELS], 2).flatten(1)
            answer, kept, task = torch.cat([told, torch.full((batch, 1), EOS)], 1), u == u, EXPLAIN
        front = torch.tensor([[BOS, task]]).expand(batch, 2)
        tokens = torch.cat([front, rows, torch.full((batch, 1), SEP), answer], 1)[kept]
        labels = torch.full_like(tokens, IGNORE)
        labels[:, -answer.shape[1] :] = tokens[:, -answer.shape[1] :]
        found.append({"input_ids": tokens, "labels": labels})
    return found


def _row(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    tokens = torch.tensor([*prompt, *answer])
    labels = torch.full_like(tokens, IGNORE)
    labels[len(prompt) :] = tokens[len(prompt) :]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
