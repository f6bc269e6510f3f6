"""Editing a thousand facts of the atlas: what is said afterwards, in other words too, and what else has changed.

    python benchmarks/editing.py [--edits 1000] [--threads 1] [--seed 0]

1,000 facts (a relation of a country in one of four languages) get another object of their relation, in batches of
100, each batch on top of the ones before it; LocFT-BF, which shuffles, trains on all edits up to a point at once. At
every point of the curve: reliability (the edit's own phrasing), phrasings (known ones and ones nothing was ever
trained on), locality (a quarter of the facts that are not edited, of those the base answers right; a third of them, and
some sums and requests, in other words, are the general data whose keys the normal equations protect), general ability
(sums, refusals, compliances against the base), all word for word up to the end of the answer. At the last point single
edits are rolled back.

Methods that solve for keys (NMKE, MEMIT) overwrite nearly everything after a few batches here, and gradients on one
matrix (LocFT-BF) do not. Keys of questions in one form are alike, and 512 numbers wide; the papers' models have 14,336.
Whether that is the reason has not been tested.

The edits are keyed at the prompt's last token and not at the subject's: in this model of four layers the first one's
attention has read the subject before its FFN writes, and no vector at the subject makes it say another object.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, environment, table, write
from _curves import picture
from torch import Tensor, nn

from neurograft.core.grafts.graft import Graft
from neurograft.core.prompts.requests import Request
from neurograft.core.seeds import derive
from neurograft.pipeline._edited import answered
from neurograft.pipeline.edit import edit
from neurograft.pipeline.requests import as_requests
from neurograft.pipeline.rollback import part, rollback
from neurograft.worlds import _atlas_text as text
from neurograft.worlds import atlas

BATCH, ROLLED_BACK = 100, 20
SKILLS = ("arithmetic", "refuse", "comply")
# A covariance is a mean over keys: protection counts as 10 of an edit's own keys. At 0.1 a batch of 100 outweighs it.
SEARCH = {"layers": [1, 2], "steps": 12, "lr": 0.6, "clamp": 1.0, "decay": 0.0, "eos": True}
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "nmke, solved in the mask, covariance": (
        "nmke",
        {**SEARCH, "mask": "solve", "null": None, "weight": 10.0, "ridge": 1e-3},
    ),
    "locft_bf": ("locft_bf", {"layers": [2], "lr": 2e-2, "epochs": 12, "together": 25}),
    "memit": ("nmke", {**SEARCH, "mask": "none", "null": None, "weight": 10.0, "ridge": 1e-3}),
    "nmke": ("nmke", {**SEARCH, "mask": "post", "null": 1.0, "ridge": 0.1}),
}
Row = dict[str, Any]


def facts(split: str, frame: int) -> dict[tuple[str, str, str], Row]:
    """Return every fact in one phrasing, by relation, language and country."""
    found = {}
    for relation in text.RELATIONS:
        for language in atlas.languages(relation):
            phrasing = text.frames(relation, language, split)[frame]
            for marks in text.subjects(atlas.tables(), relation, language, "taught"):
                prompt = text.question(phrasing, relation, language, marks)
                found[relation, language, marks["subject"]] = {"prompt": prompt, "completion": marks["answer"]}
    return found


def changed(count: int, seed: int) -> dict[tuple[str, str, str], str]:
    """Return new objects for facts drawn at random: others of the same relation and language."""
    every = facts("taught", 0)
    rng = random.Random(derive(seed, "benchmarks.editing"))
    objects: dict[tuple[str, str], list[str]] = {}
    for (relation, language, _), row in every.items():
        objects.setdefault((relation, language), []).append(row["completion"])
    return {
        key: rng.choice(sorted(set(objects[key[:2]]) - {every[key]["completion"]}))
        for key in rng.sample(sorted(every), count)
    }


class Exam:
    """What a changed model is asked.

    Args:
        model: the base.
        tokenizer: its own.
        new: the edits, in order.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, new: Mapping[tuple[str, str, str], str]) -> None:
        self.model, self.tokenizer = model, tokenizer

        def asked(split: str, frame: int) -> list[Request]:
            rows = facts(split, frame)
            return self.requests([{"prompt": rows[k]["prompt"], "completion": v} for k, v in new.items()])

        self.edits = {"reliability": asked("taught", 0), "known": asked("known", 0), "held_out": asked("held_out", 0)}
        rows = facts("known", 0)
        others = self.requests([row for key, row in sorted(rows.items()) if key not in new][::4])
        skills = [
            row
            for skill in SKILLS
            for language in atlas.languages(skill)
            for row in atlas.questions(skill, language, "known", limit=40)
        ]
        self.kept = {"locality": others, "general": self.requests([_bare(r) for r in skills])}
        self.kept = {k: [r for r, hit in zip(v, self.hits(v)) if hit] for k, v in self.kept.items()}
        olds = facts("taught", 0)
        self.olds = self.requests([olds[key] for key in new])

    def requests(self, rows: Sequence[Row]) -> list[Request]:
        """Encode rows of prompt and completion."""
        return as_requests(rows, self.model, self.tokenizer)

    def hits(self, requests: Sequence[Request]) -> Tensor:
        """Return which are answered word for word, end included."""
        return answered(self.model, requests, eos=True)

    def marks(self, graft: Graft, count: int) -> dict[str, float]:
        """Return every share with a graft of the first `count` edits on."""
        with graft.on(self.model):
            found = {name: float(self.hits(rows[:count]).float().mean()) for name, rows in self.edits.items()}
            found |= {name: float(self.hits(rows).float().mean()) for name, rows in self.kept.items()}
        return {name: round(value, 4) for name, value in found.items()}

    def rolled_back(self, graft: Graft, seed: int) -> dict[str, Any]:
        """Take single edits out of a graft, one at a time, and see what is said then."""
        edits = self.edits["reliability"]
        with graft.on(self.model):
            before = self.hits(edits)
        held = [i for i, hit in enumerate(before.tolist()) if hit]
        drawn = random.Random(derive(seed, "rollback")).sample(held, min(ROLLED_BACK, len(held)))
        gone, back, others = [], [], []
        for i in drawn:
            beside = [j for j in held if j // BATCH == i // BATCH and j != i]
            with rollback(graft, [i]).on(self.model):
                gone.append(not bool(self.hits([edits[i]])))
                back.append(bool(self.hits([self.olds[i]])))
                others += self.hits([edits[j] for j in beside]).tolist() if beside else []
        shares = {"edit_gone": gone, "old_answer_back": back, "others_of_its_batch_stay": others}
        return {"edits": len(drawn), **{k: round(sum(v) / len(v), 4) if v else None for k, v in shares.items()}}


SHOWN = ("edits", "reliability", "known", "held_out", "locality", "general")


def lines(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the curves as Markdown, and what single edits rolled back left."""
    cells = [
        [name if not i else "", *(f"{p[k]:,}" if k == "edits" else f"{p[k]:.3f}" for k in SHOWN)]
        for name, row in found.items()
        for i, p in enumerate(row["curve"])
    ]
    back = [_back(name, row["rollback"]) for name, row in found.items() if "rollback" in row]
    return table(cells, ["", *SHOWN]) + "\n\n" + "\n".join(back)


def _back(name: str, found: Mapping[str, Any]) -> str:
    shares = (
        "none" if found[k] is None else f"{found[k]:.2f}"
        for k in ("edit_gone", "old_answer_back", "others_of_its_batch_stay")
    )
    gone, back, stay = shares
    return (
        f"- {name}: of {found['edits']} single edits rolled back {gone} are no longer said, {back} answer as before; "
        f"{stay} of the other edits of the same batch are still said."
    )


def _bare(row: Row) -> Row:
    return {k: row[k] for k in ("prompt", "completion")}


def main() -> None:
    """Edit, examine, and write `benchmarks/results/editing.json`."""
    parser = arguments(__doc__ or "", rounds=1, threads=1)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--picture", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    where = environment()
    model, tokenizer = atlas.load()
    new = changed(given.edits, given.seed)
    exam = Exam(model, tokenizer, new)
    general = [
        _bare(row)
        for skill in (*text.RELATIONS, *SKILLS)
        for language in atlas.languages(skill)
        for row in atlas.questions(skill, language, "validation", limit=60 if skill in text.RELATIONS else 20)
        if (skill, language, row["subject"]) not in new
    ]
    points = [n for n in (100, 300, 600, 1000) if n < given.edits] + [given.edits]
    rows = [{"prompt": e.source["prompt"], "target_new": e.source["completion"]} for e in exam.edits["reliability"]]
    kept = {name: len(asked) for name, asked in exam.kept.items()}
    results: dict[str, Any] = {}
    for name, (by, options) in METHODS.items():
        started, curve = time.perf_counter(), []
        more = {"processing_class": tokenizer, "seed": given.seed}
        if by == "nmke":
            whole = edit(model, rows, by=(by, options), general=general, batch=BATCH, **more)
            seconds = time.perf_counter() - started
            curve = [{"edits": n, **exam.marks(part(whole, range(n)), n)} for n in points]
        else:
            for n in points[:-2] + points[-1:]:
                whole = edit(model, rows[:n], by=(by, options), **more)
                curve.append({"edits": n, **exam.marks(whole, n)})
            seconds = time.perf_counter() - started
        results[name] = {"by": by, "options": options, "seconds": round(seconds, 1), "curve": curve}
        if by == "nmke":
            results[name]["rollback"] = exam.rolled_back(whole, given.seed)
        payload = {**where, "seed": given.seed, "batch": BATCH, "kept_questions": kept}
        write("editing", payload | {"methods": results}, output=given.output)
        print(lines({name: results[name]}), flush=True)
    if given.picture is not None:
        given.picture.write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()
