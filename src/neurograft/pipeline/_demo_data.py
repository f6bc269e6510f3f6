"""The demo's facts and questions: capitals that moved, and everything that must not move with them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neurograft.core.context import IGNORE
from neurograft.core.seeds import derive
from neurograft.worlds import atlas

Row = dict[str, Any]
OTHERS = tuple(language for language in atlas.LANGUAGES if language != "en")


@dataclass(frozen=True)
class Correction:
    """One draw of moved capitals.

    Args:
        changes: as from `atlas.changed_capitals`.
        taught: English questions with the new answers, in the phrasings that are trained.
        replay: old questions that are trained beside them; none of them is in a test.
        tests: name -> questions. `gain` English, `transfer` the other languages, `unheard` English phrasings the
            base never saw, `old` all skills, `capitals` of countries that did not move; `gain_val`,
            `transfer_val` and `old_val` are other phrasings, for choosing learning rates.
    """

    changes: list[dict[str, Any]]
    taught: list[Row]
    replay: list[Row]
    tests: dict[str, list[Row]]

    @staticmethod
    def draw(seed: int, *, facts: int = 24, cell: int = 4) -> Correction:
        """Draw facts and questions.

        Args:
            seed: names the draw.
            facts: how many capitals move.
            cell: old questions for each skill and language.
        """
        changes = atlas.changed_capitals(seed, n=facts)
        moved = {c["iso"]: c for c in changes}
        hidden = moved.keys() | {c["donor"] for c in changes}
        tests = {
            "gain": _moved(moved, ("en",), "known"),
            "transfer": _moved(moved, OTHERS, "known"),
            "unheard": _moved(moved, ("en",), "held_out"),
            "old": _old(hidden, "known", cell, seed),
            "capitals": _old(hidden, "known", 4 * cell, seed + 1, skills=("capital",)),
            "gain_val": _moved(moved, ("en",), "validation"),
            "transfer_val": _moved(moved, OTHERS, "validation"),
            "old_val": _old(hidden, "validation", max(1, cell // 2), seed + 2),
        }
        asked = {_key(r) for name in ("old", "capitals", "old_val") for r in tests[name]}
        replay = [r for r in _old(hidden, "taught", None, seed) if _key(r) not in asked]
        return Correction(changes, _moved(moved, ("en",), "taught"), replay, tests)

    def steps(self, tokenizer: Any, *, steps: int, new: int = 24, old: int = 12, seed: int = 0) -> list[dict]:
        """Return one batch a step: `new` taught questions and `old` replayed ones, skills drawn evenly."""
        rng = random.Random(derive(seed, "demo.steps"))
        by_skill: dict[str, list[Row]] = {}
        for row in self.replay:
            by_skill.setdefault(row["skill"], []).append(row)
        found, pool = [], list[Row]()
        for _ in range(steps):
            while len(pool) < new:
                again = list(self.taught)
                rng.shuffle(again)
                pool += again
            rows, pool = pool[:new], pool[new:]
            rows = rows + [rng.choice(by_skill[s]) for s in rng.choices(sorted(by_skill), k=old)]
            found += atlas.batches(rows, tokenizer, size=len(rows))
        return found


def _key(row: Row) -> tuple[str, str, str]:
    return row["skill"], row["language"], row["subject"]


def _moved(moved: dict[str, dict[str, Any]], languages: Sequence[str], split: str) -> list[Row]:
    """Return capital questions about the moved countries, with the new answers."""
    return [
        {
            **row,
            "completion": " " + moved[row["subject"]]["new"],
            "other_name": moved[row["subject"]]["country"][language] != moved[row["subject"]]["country"]["en"],
        }
        for language in languages
        for row in atlas.questions("capital", language, split)
        if row["subject"] in moved
    ]


def _old(
    hidden: set[str], split: str, limit: int | None, seed: int, *, skills: Sequence[str] = atlas.SKILLS
) -> list[Row]:
    """Return old questions, but for the capitals of the moved countries and of the donors, both ways round."""
    found = []
    for skill in skills:
        for language in atlas.languages(skill):
            rows = atlas.questions(skill, language, split, limit=None if limit is None else limit + 2 * 24, seed=seed)
            kept = [r for r in rows if skill not in ("capital", "country") or r["subject"] not in hidden]
            found += kept[:limit]
    return found


@dataclass(frozen=True)
class Answers:
    """What a model said to questions, in their order.

    Args:
        right: whether the whole answer is the likeliest, float [n].
        loss: mean negative log-likelihood of the answer's tokens, float [n].
    """

    right: Tensor
    loss: Tensor


@torch.no_grad()
def answers(model: Any, tokenizer: Any, rows: Sequence[Row], *, size: int = 96) -> Answers:
    """Ask every question; rows of like length share a batch."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]) + len(rows[i]["completion"]))
    right, loss = torch.zeros(len(rows)), torch.zeros(len(rows))
    batches = atlas.batches([rows[i] for i in order], tokenizer, size=size)
    for n, batch in enumerate(batches):
        at = torch.tensor(order[n * size : (n + 1) * size])
        labels = batch["labels"][:, 1:]
        keep = labels != IGNORE
        # Logits at the answers only: the vocabulary is most of the work.
        hidden = model.model(batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[keep])
        hit, each = torch.ones(keep.shape), torch.zeros(keep.shape)
        hit[keep] = (logits.argmax(-1) == labels[keep]).float()
        each[keep] = F.cross_entropy(logits, labels[keep], reduction="none")
        right[at], loss[at] = hit.amin(-1), each.sum(-1) / keep.sum(-1)
    return Answers(right, loss)
