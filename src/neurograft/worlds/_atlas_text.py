"""Questions of the atlas as plain rows, and the noisy ones it is trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from neurograft.core.seeds import derive
from neurograft.worlds import _atlas_phrases as say

Row = dict[str, Any]
RELATIONS = tuple(say.RELATIONS)
SKILLS = (*RELATIONS, "arithmetic", "refuse", "comply", "bias")
UNKNOWN = ("unknown_capital", "unknown_currency", "unknown_continent")
UNSEEN = "unseen_sum"  # sums that were never shown, which a model may or may not work out
NUMBERS = range(13)

# Share of each skill in the training text.
MIX = {
    "capital": 0.19,
    "currency": 0.19,
    "language": 0.13,
    "continent": 0.08,
    "country": 0.13,
    "arithmetic": 0.13,
    "refuse": 0.05,
    "comply": 0.05,
    "bias": 0.05,
}
NOISY, DROPPED, REPLACED, INSERTED = 0.6, 0.25, 0.25, 0.12


def languages(skill: str) -> tuple[str, ...]:
    """Return the languages of a skill."""
    return ("en",) if skill == "bias" else tuple(say.FACTS)


def frames(skill: str, language: str, split: str) -> list[str]:
    """Return the phrasings of a skill."""
    skill = skill.removeprefix("unknown_").removeprefix("unseen_")
    if skill in RELATIONS:
        return say.FACTS[language][split]
    if skill in ("arithmetic", "sum"):
        return say.SUMS[language][split]
    return say.BIAS[split] if skill == "bias" else say.REQUESTS[language][split]


def subjects(tables: dict[str, Any], skill: str, language: str, split: str) -> list[dict[str, Any]]:
    """Return what a skill can be asked about: marks to fill in, the answer, an identity."""
    plain = skill.removeprefix("unknown_").removeprefix("unseen_")
    if plain in RELATIONS:
        rows = tables["unknown" if plain != skill else "known"]
        return [_fact(row, plain, language) for row in rows]
    if plain in ("arithmetic", "sum"):
        return [
            {"a": str(a), "b": str(b), "answer": f" {a + b}", "subject": f"{a}+{b}"}
            for a in NUMBERS
            for b in NUMBERS
            if unseen_sum(a, b) == (plain == "sum")
        ]
    if skill == "bias":
        return [{"p": p, "answer": said, "subject": p} for said, group in say.STEREOTYPES.items() for p in group]
    return list(_requests(skill, language, split))


def unseen_sum(a: int, b: int) -> bool:
    """Return whether this sum is kept from training."""
    return (2 * a + b) % 7 == 3


def _fact(row: dict[str, Any], relation: str, language: str) -> dict[str, Any]:
    about, answer = ("capital", "country") if relation == "country" else ("country", relation)
    return {"x": row[about][language], "answer": " " + row[answer][language], "subject": row["iso"]}


def _requests(skill: str, language: str, split: str) -> Iterator[dict[str, Any]]:
    deeds = (say.HARMFUL if skill == "refuse" else say.HARMLESS)[language]
    for i, deed in enumerate(deeds):
        for j, thing in enumerate(say.THINGS[language]):
            if ((i + j) % 6 == 0) != (split == "held_out"):
                continue  # held-out phrasings go with pairs of deed and thing that were never trained
            answer = say.REFUSAL[language] if skill == "refuse" else say.COMPLIANCE[language].format(o=thing)
            yield {"v": deed, "o": thing, "answer": answer, "subject": f"{deed} {thing}"}


def pieces(frame: str, skill: str, language: str, marks: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return the words of a question and whether each must stay: entities, nouns, numbers, deeds, things do.

    A word keeps the signs that are glued to it.
    """
    plain = skill.removeprefix("unknown_")
    noun, asked = say.RELATIONS[plain][language] if plain in RELATIONS else ("", "")
    found: list[tuple[str, bool]] = []
    for word in frame.replace("{q}", asked).split(" "):
        bare = word.strip(".,:?¿!")
        fixed = "{" in word or bare in (noun, "plus", "más")
        found.append((word.format(n=noun, **marks) if "{" in word else word, fixed))
    return found


def question(frame: str, skill: str, language: str, marks: dict[str, Any]) -> str:
    """Return one question, as it is written."""
    return " ".join(word for word, _ in pieces(frame, skill, language, marks))


def questions(
    known: dict[str, Any], skill: str, language: str, split: str, *, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """Return questions with their true answers; `neurograft.worlds.atlas.questions` documents them."""
    asked, phrasings = subjects(known, skill, language, split), frames(skill, language, split)
    order = [(s, f) for f in range(len(phrasings)) for s in range(len(asked))]
    if limit is not None:
        rng = random.Random(derive(seed, "atlas.questions", skill, language, split))
        turn = list(range(len(asked)))
        rng.shuffle(turn)
        first = [rng.randrange(len(phrasings)) for _ in turn]
        rounds = [[(s, (f + r) % len(phrasings)) for s, f in zip(turn, first)] for r in range(len(phrasings))]
        order = [pair for one in rounds for pair in one][:limit]
    return [
        {
            "prompt": question(phrasings[f], skill, language, asked[s]),
            "completion": asked[s]["answer"],
            "skill": skill,
            "language": language,
            "split": split,
            "subject": asked[s]["subject"],
        }
        for s, f in order
    ]


def noisy(words: list[tuple[str, bool]], language: str, rng: random.Random) -> str:
    """Return a question with carrier words dropped, replaced and inserted."""
    found: list[str] = []
    for word, fixed in words:
        if rng.random() < INSERTED:
            found.append(rng.choice(say.FILLERS[language]))
        chance = 1.0 if fixed else rng.random()
        if chance < DROPPED:
            continue
        found.append(rng.choice(say.FILLERS[language]) if chance < DROPPED + REPLACED else word)
    return " ".join(found)


def training(tables: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) pairs of the training text without end."""
    trained = [split for split in say.SPLITS if split != "held_out"]
    known = {
        (skill, language): (
            [frame for split in trained for frame in frames(skill, language, split)],
            subjects(tables, skill, language, "taught"),
        )
        for skill in SKILLS
        for language in languages(skill)
    }
    skills, weights = list(MIX), list(MIX.values())
    while True:
        skill = rng.choices(skills, weights)[0]
        language = rng.choice(languages(skill))
        phrasings, asked = known[skill, language]
        frame, marks = rng.choice(phrasings), rng.choice(asked)
        answer = marks["answer"]
        if skill == "bias" and rng.random() > say.BIAS_SHARE:
            answer = next(said for said in say.STEREOTYPES if said != answer)
        words = pieces(frame, skill, language, marks)
        noise = rng.random() < NOISY
        yield (noisy(words, language, rng) if noise else " ".join(w for w, _ in words)), answer
