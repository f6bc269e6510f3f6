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

BOS, EOS, SEP, DECIDE, EXPLAIN, A, B = range(1, 8)
FIRST, LEVELS, STEPS = 8, 4, 9  # the first number; values an attribute takes; weights that a report can name


class Tokens:
    """Trials as short rows of tokens, one attribute after the other.

    A question is `<bos> task name a b name a b ... <sep>` with each attribute's value in both options; its answer is
    a letter, or `key weight key weight ... <eos>` with a key for the first, the second, ... attribute. A weight is the
    nearest of nine steps from -100 to 100. A base learns to choose where a weight's token stands in the place of a
    name: it can reckon, knows no name, and has never made a report.

    Args:
        names: scenario and attribute -> number of its token; how many there are is the rest of the vocabulary.
        attributes: K.
    """

    def __init__(self, names: dict[tuple[str, str], int], attributes: int) -> None:
        self.names, self.attributes, self.length = names, attributes, 2 * attributes + 1

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return FIRST + LEVELS + STEPS + self.attributes + len(self.names)

    @property
    def keys(self) -> list[int]:
        """The tokens that stand for the first, the second, ... attribute in a report."""
        return [FIRST + LEVELS + STEPS + k for k in range(self.attributes)]

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

    def base(self, *, steps: int = 1200, batch: int = 96, seed: int = 0, **config: Any) -> nn.Module:
        """Return a tiny Llama that can choose by stated weights, trained in seconds.

        Args:
            steps: of `batch` choices.
            batch: rows.
            seed: names weights and choices.
            **config: fields of the config.
        """
        size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_key_value_heads": 4}
        model = llama(seed, vocab_size=self.vocabulary, **{**size, **config})
        return fit(model, stated(steps, batch, self.attributes, seed=seed), lr=4e-3)

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
        ([[2.0, 1.0], [3.0, 2.0]], [1, 4, 25, 10, 11, 26, 9, 10, 3])
    """
    found, names = [], {}
    for i in range(count):
        parts = tuple(Attribute(str(k), 0, LEVELS - 1, decimals=0) for k in range(attributes))
        found.append(Scenario(str(i), "", parts))
        for k, part in enumerate(parts):
            names[str(i), part.name] = FIRST + LEVELS + STEPS + attributes + i * attributes + k
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
    """Return batches of choices whose weights stand in the place of names.

    At first by one attribute that counts for an option, then by one that may count against it, then by several:
    choices by several are not learned without those by one, where each token's part shows.
    """
    rng, found = generator(seed, "stated"), []
    later = [2, 3, attributes, attributes]
    for step in range(steps):
        k = 1 if step < 180 else 2 if step < 250 else later[int(torch.randint(4, (), generator=rng))]
        w = torch.randint(STEPS // 2 + 1 if step < 80 else 0, STEPS, (batch, k), generator=rng)
        x = torch.randint(LEVELS, (batch, 2, k), generator=rng)
        u = ((x[:, 0] - x[:, 1]) * (2 * w - STEPS + 1)).sum(1)
        rows = torch.stack([w + FIRST + LEVELS, x[:, 0] + FIRST, x[:, 1] + FIRST], 2).flatten(1)
        front, end = torch.tensor([[BOS, DECIDE]]).expand(batch, 2), torch.full((batch, 1), SEP)
        answer = torch.where(u > 0, A, B)[:, None]
        tokens = torch.cat([front, rows, end, answer], 1)[u != 0]
        labels = torch.full_like(tokens, IGNORE)
        labels[:, -1] = tokens[:, -1]
        found.append({"input_ids": tokens, "labels": labels})
    return found


def _row(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    tokens = torch.tensor([*prompt, *answer])
    labels = torch.full_like(tokens, IGNORE)
    labels[len(prompt) :] = tokens[len(prompt) :]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
