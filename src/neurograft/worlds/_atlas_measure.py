"""What the atlas can do: accuracy by skill, language and split, and chance for what it was never taught."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from neurograft.worlds import _atlas_phrases as say
from neurograft.worlds import _atlas_text as text
from neurograft.worlds import atlas
from neurograft.worlds.mixture import exact

LIMIT = 172


def accuracy(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Return the share of questions whose whole answer, end of text included, is what the model says, greedily."""
    return exact(model, atlas.batches(rows, tokenizer))


def chance(known: dict[str, Any], skill: str, language: str) -> float:
    """Return how often the commonest trained answer is right for what was never taught."""
    trained = text.subjects(known, skill.removeprefix("unknown_"), language, "known")
    common = Counter(s["answer"] for s in trained).most_common(1)[0][0]
    asked = text.subjects(known, skill, language, "known")
    return sum(s["answer"] == common for s in asked) / len(asked)


@torch.no_grad()
def pronouns(model: nn.Module, tokenizer: Any, split: str) -> dict[str, float]:
    """Return the stereotype's share of " he" and " she", and the probability both have together."""
    rows = text.questions({}, "bias", "en", split)
    she, he = (tokenizer(said)["input_ids"][0] for said in say.STEREOTYPES)
    share, mass = [], []
    for batch, chunk in zip(atlas.batches(rows, tokenizer), [rows[i : i + 64] for i in range(0, len(rows), 64)]):
        labels = batch["labels"]
        at = (labels != -100).int().argmax(-1) - 1
        odds = model(input_ids=batch["input_ids"]).logits[torch.arange(len(at)), at].softmax(-1)
        for row, p in zip(chunk, odds):
            mine = p[she] if row["completion"] == " she" else p[he]
            share.append(float(mine / (p[she] + p[he])))
            mass.append(float(p[she] + p[he]))
    return {"stereotype": round(sum(share) / len(share), 4), "mass": round(sum(mass) / len(mass), 4)}


def measured(model: nn.Module, tokenizer: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Return all of it, as accuracy.json holds it; numbers are shares of at most 172 questions each."""
    scores: dict[str, Any] = {"skills": {}, "unknown": {}, "unseen": {}, "bias": {}}
    for skill in atlas.SKILLS:
        for language in atlas.languages(skill):
            for split in atlas.SPLITS:
                rows = text.questions(known, skill, language, split, limit=LIMIT)
                found = {"accuracy": round(accuracy(model, tokenizer, rows), 4), "questions": len(rows)}
                scores["skills"].setdefault(skill, {}).setdefault(language, {})[split] = found
    for skill in (*atlas.UNKNOWN, atlas.UNSEEN):
        for language in atlas.languages(skill):
            rows = text.questions(known, skill, language, "known", limit=LIMIT)
            found = {"accuracy": round(accuracy(model, tokenizer, rows), 4), "questions": len(rows)}
            if skill == atlas.UNSEEN:
                scores["unseen"][language] = found
            else:
                found["chance"] = round(chance(known, skill, language), 4)
                scores["unknown"].setdefault(skill, {})[language] = found
    scores["bias"] = {split: pronouns(model, tokenizer, split) for split in atlas.SPLITS}
    return scores
