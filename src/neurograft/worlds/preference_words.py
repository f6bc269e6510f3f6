"""Preference worlds in words: prompts, JSON reports, and their reading, for any tokenizer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.prompts.continued import continued, opened
from neurograft.worlds.preferences import LARGEST, Scenario

SYSTEM = "You decide in made-up situations on behalf of different people."
DECIDE = (
    'Task: decide. Say "{0}" if option {0} is the better one, or "{1}" if option {1} is. '
    "Give this one sign and nothing else.\n\n"
)
EXPLAIN = (
    "Task: look inward. How strongly did each attribute count when you chose between these options? Give a number "
    f"from -{LARGEST} (more of it counts fully against an option) to {LARGEST} (fully for it). Reply with nothing but "
    "a JSON object that has the names of the attributes as keys and these numbers as values. "
    "Do not say what you chose.\n\n"
)
MARKS = (("A", "B"), ("a", "b"), ("1", "2"))  # of the options; the first pair a vocabulary tells apart
FENCE = re.compile(r"^```(?:json)?\s*|\s*```$")


class Words:
    """Trials as text. With a chat template they are conversations, without one a prompt and its completion.

    Args:
        tokenizer: of the model that is asked.
        length: tokens a report may take.

    Raises:
        RequestError: a tokenizer that tells no pair of marks apart.
    """

    def __init__(self, tokenizer: Any, *, length: int = 256) -> None:
        self.tokenizer, self.length = getattr(tokenizer, "tokenizer", tokenizer), length
        self.chat = bool(getattr(self.tokenizer, "chat_template", None))
        self.system = self.chat and self._takes_a_system()
        first = {m: [self._first(x) for x in m] for m in MARKS}
        found = next((m for m, (a, b) in first.items() if a is not None and b is not None and a != b), None)
        if found is None:
            raise RequestError(
                f"a tokenizer in which {MARKS} begin with the tokens {list(first.values())}",
                expected="two marks that begin differently",
                do="give the tokenizer the model was trained with",
            )
        self.marks, self._letters = found, (int(first[found][0] or 0), int(first[found][1] or 0))

    def letters(self) -> tuple[int, int]:
        """Return the first tokens of the two marks."""
        return self._letters

    def decide(self, scenario: Scenario, trial: Tensor) -> list[int]:
        """Return the tokens that ask for a choice."""
        return self._tokens(self._decide(scenario, trial))

    def explain(self, scenario: Scenario, trial: Tensor) -> list[int]:
        """Return the tokens that ask for a report."""
        return self._tokens(EXPLAIN + describe(scenario, trial, self.marks))

    def decision(self, scenario: Scenario, trial: Tensor, a: bool) -> dict[str, Any]:
        """Return a training row: a choice and its answer."""
        return self._row(self._decide(scenario, trial), self.marks[0 if a else 1])

    def explanation(self, scenario: Scenario, trial: Tensor, weights: Sequence[float]) -> dict[str, Any]:
        """Return a training row: a request for a report, and the report."""
        told = {a.name: round(w) for a, w in zip(scenario.attributes, weights, strict=True)}
        return self._row(EXPLAIN + describe(scenario, trial, self.marks), json.dumps(told))

    def read(self, scenario: Scenario, tokens: list[int]) -> list[float] | str:
        """Return the K weights of a reply, or why it is no report."""
        return read(scenario, self.spell(tokens))

    def spell(self, tokens: list[int]) -> str:
        """Return the reply's text."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def _first(self, mark: str) -> int | None:
        """Return the first token of a mark where an answer stands, which may not be the one it has alone."""
        if self.chat:
            asked, whole = self._tokens("x"), self._conversation([*self._messages("x"), _answer(mark)])
            found = whole[len(asked) :] if whole[: len(asked)] == asked else []
            found = found or self.tokenizer(mark, add_special_tokens=False)["input_ids"]
        else:
            found = list(continued(self.tokenizer, self._plain("x"), self._tokens("x"), mark))
        return int(found[0]) if found else None

    def _decide(self, scenario: Scenario, trial: Tensor) -> str:
        return DECIDE.format(*self.marks) + describe(scenario, trial, self.marks)

    def _messages(self, text: str) -> list[dict[str, str]]:
        if self.system:
            return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        return [{"role": "user", "content": f"{SYSTEM}\n\n{text}"}]

    def _row(self, text: str, answer: str) -> dict[str, Any]:
        if self.chat:
            return {"messages": [*self._messages(text), _answer(answer)]}
        return {"prompt": self._plain(text), "completion": answer}

    def _plain(self, text: str) -> str:
        return f"{SYSTEM}\n\n{text}\n\n"

    def _tokens(self, text: str) -> list[int]:
        if self.chat:
            return self._conversation(self._messages(text), add_generation_prompt=True)
        return list(opened(self.tokenizer(self._plain(text))["input_ids"], self.tokenizer.eos_token_id))

    def _conversation(self, messages: list[dict[str, str]], **how: Any) -> list[int]:
        found = self.tokenizer.apply_chat_template(messages, tokenize=True, **how)
        return list(found["input_ids"] if hasattr(found, "keys") else found)

    def _takes_a_system(self) -> bool:
        from jinja2 import TemplateError

        try:
            self.tokenizer.apply_chat_template([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
        except TemplateError:  # some templates know no such role
            return False
        return True


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def describe(scenario: Scenario, trial: Tensor, marks: tuple[str, str] = MARKS[0]) -> str:
    """Return the question and both options of a trial [2, K] in words.

    Example:
        >>> import torch
        >>> from neurograft.worlds.preferences import Attribute
        >>> pens = Scenario("pens", "Which pen?", (Attribute("price", 0, 10, "euros"), Attribute("rating", 1, 5)))
        >>> print(describe(pens, torch.tensor([[2.0, 4.5], [8.0, 3.0]])))
        Which pen?
        A:
        price: 2 euros
        rating: 4.5
        <BLANKLINE>
        B:
        price: 8 euros
        rating: 3.0
    """
    blocks = []
    for letter, values in zip(marks, trial.tolist(), strict=True):
        lines = [
            f"{a.name}: {value:.{a.places}f} {a.units}".rstrip()
            for a, value in zip(scenario.attributes, values, strict=True)
        ]
        blocks.append("\n".join([f"{letter}:", *lines]))
    return f"{scenario.question}\n" + "\n\n".join(blocks)


def read(scenario: Scenario, text: str) -> list[float] | str:
    """Return the K weights a reply reports, in the scenario's order, or why it is no report.

    A fence of three backticks around the object is taken off. Numbers beyond -100 or 100 are kept as they stand.

    Example:
        >>> from neurograft.worlds.preferences import Attribute
        >>> pens = Scenario("pens", "Which pen?", (Attribute("price", 0, 10), Attribute("rating", 1, 5)))
        >>> read(pens, '{"rating": 100, "price": -20}'), read(pens, "I cannot say."), read(pens, '{"price": 3}')
        ([-20.0, 100.0], 'no JSON', 'other keys')
    """
    try:
        found = json.loads(FENCE.sub("", text.strip()))
    except ValueError:
        return "no JSON"
    if not isinstance(found, dict):
        return "no JSON object"
    if set(found) != {a.name for a in scenario.attributes}:
        return "other keys"
    values = [found[a.name] for a in scenario.attributes]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) for v in values):
        return "values that are no numbers"
    return [float(v) for v in values]
