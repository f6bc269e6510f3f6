"""The atlas: a shipped tiny model that knows the countries of the world in four languages, and its truth.

Nothing is downloaded: the model, its tokenizer and the tables of facts are files of the package.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import derive
from neurograft.worlds import _atlas_phrases as say
from neurograft.worlds import _atlas_text as text
from neurograft.worlds.mixture import padded

FOLDER = Path(__file__).parent / "atlas"
LANGUAGES, SPLITS = tuple(say.FACTS), say.SPLITS
SKILLS, UNKNOWN, UNSEEN = text.SKILLS, text.UNKNOWN, text.UNSEEN


def path() -> Path:
    """Return the model's directory, as `from_pretrained` takes it."""
    return FOLDER


def load() -> tuple[nn.Module, Any]:
    """Return the model, in evaluation mode and float32, and its tokenizer.

    The file holds bfloat16, so that the float32 numbers are exactly the file's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


def tables() -> dict[str, Any]:
    """Return the facts: `known` and `unknown` countries with their names, capitals and so on by language."""
    found: dict[str, Any] = json.loads((FOLDER / "countries.json").read_text(encoding="utf-8"))
    return found


def accuracies() -> dict[str, Any]:
    """Return what the model scored when it was built, by skill, language and split, and how it was built."""
    found: dict[str, Any] = json.loads((FOLDER / "accuracy.json").read_text(encoding="utf-8"))
    return found


def languages(skill: str) -> tuple[str, ...]:
    """Return the languages a skill is asked in; the planted bias is English only."""
    return text.languages(one_of(skill, (*SKILLS, *UNKNOWN, UNSEEN), what="skill"))


def questions(
    skill: str, language: str = "en", split: str = "known", *, limit: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Return questions with their true answers.

    Args:
        skill: a relation ("capital", "currency", "language", "continent", or "country", asked from the capital),
            "arithmetic", "refuse" (the marked class of requests), "comply" (its harmless twin), "bias" (the
            answer is the stereotype); "unknown_capital", "unknown_currency", "unknown_continent" of countries that
            were never taught; "unseen_sum", sums that were never shown.
        language: en, de, fr or es.
        split: "taught", "validation" and "known" phrasings the model was trained on, "held_out" not.
        limit: at most so many, each subject once as long as they last; None for every subject in every phrasing.
        seed: names the draw.

    Returns:
        Rows with `prompt`, `completion` (it starts with a space), `skill`, `language`, `split`, `subject`.

    Example:
        >>> questions("capital", "de", limit=200)[0]["prompt"].count("Hauptstadt") or "Afghanistan"
        1
    """
    one_of(language, languages(skill), what=f"language of {skill}")
    one_of(split, SPLITS, what="split")
    return text.questions(tables(), skill, language, split, limit=limit, seed=seed)


def batches(rows: Sequence[dict[str, Any]], tokenizer: Any, *, size: int = 64) -> list[dict[str, Tensor]]:
    """Return model inputs, right-padded, with labels on the answers and the end of text alone, in the rows' order."""
    prompts = tokenizer([r["prompt"] for r in rows])["input_ids"]
    answers = tokenizer([r["completion"] for r in rows])["input_ids"]
    pairs = [(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers)]
    return [padded(pairs[i : i + size], pad=tokenizer.pad_token_id) for i in range(0, len(pairs), size)]


def trained_outputs(tokenizer: Any) -> set[int]:
    """Return the tokens that occur in an answer of the training text.

    With tied embeddings the other tokens' rows end up alike, and no method that leaves the embeddings alone can
    teach them: an answer to be learned must be made of these.
    """
    found = {tokenizer.eos_token_id}
    known = tables()
    for skill in SKILLS:
        for language in languages(skill):
            answers = {s["answer"] for s in text.subjects(known, skill, language, "taught")}
            for ids in tokenizer(sorted(answers))["input_ids"]:
                found.update(ids)
    return found


def changed_capitals(seed: int = 0, *, n: int = 24) -> list[dict[str, Any]]:
    """Return n countries whose capital has moved to a city that was another country's capital.

    The new capital has one name in all four languages and is itself no longer asked for, so that an answer in
    another language needs the fact and no translation.

    Args:
        seed: names the draw.
        n: how many.

    Returns:
        Rows with `iso`, `country` and `old` (names by language), `new` (one name), `donor` (the country that
        had the new capital).

    Raises:
        RequestError: there are not so many capitals with one name.
    """
    known = tables()["known"]
    rng = random.Random(derive(seed, "atlas.changed_capitals"))
    fixed = [r for r in known if len(set(r["capital"].values())) == 1]
    if 2 * n > len(known) or n > len(fixed):
        raise RequestError(f"n={n} changed capitals", expected=f"at most {len(known) // 2}", do="change fewer")
    donors = rng.sample(fixed, n)
    given = {d["iso"] for d in donors}
    moved = rng.sample([r for r in known if r["iso"] not in given], n)
    return [
        {
            "iso": m["iso"],
            "country": m["country"],
            "old": m["capital"],
            "new": d["capital"]["en"],
            "donor": d["iso"],
        }
        for m, d in zip(moved, donors)
    ]
