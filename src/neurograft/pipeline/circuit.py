"""A step of recipes: the circuit of attention heads behind an answer, searched backwards, pruned and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.audits.completeness import completeness
from neurograft.audits.faithfulness import faithfulness
from neurograft.audits.minimality import minimality
from neurograft.core.context import Batch, Context
from neurograft.core.errors import RequestError, near
from neurograft.core.grafts.graft import Graft
from neurograft.core.ranges import above, share
from neurograft.core.selection import Scores, Selection
from neurograft.core.taps.circuit import Circuit, Group, units_of
from neurograft.locators.path_patching import path_patching
from neurograft.pipeline.given import located_data
from neurograft.pipeline.models import load_model
from neurograft.pipeline.rows import read_rows
from neurograft.pipeline.state import as_found

STAGE = ("name", "into", "at", "share", "of", "receivers")


@dataclass(frozen=True)
class Prompts:
    """Clean prompts and a corrupt one for each, for the search, and others to measure on.

    Args:
        clean, corrupt: for the search.
        test, reference: for measuring; the same where there is but one row.
    """

    clean: Sequence[Batch]
    corrupt: Sequence[Batch]
    test: Sequence[Batch]
    reference: Sequence[Batch]


def circuit(
    state: Mapping[str, Any],
    *,
    stages: Sequence[Mapping[str, Any]],
    query: str = "end-2",
    prune: bool = True,
    metric: str = "accuracy",
    sets: int = 20,
    limit: int = 300,
    post: Any = None,
    of: str = "graft",
) -> dict[str, Any]:
    """Return the heads behind the answers as `circuit` (groups by name) and `where` (all of them), with measurements.

    Each stage is path patching into what an earlier stage found: `name`, `into` ("logits", or "queries", "keys",
    "values" of the stage `of`), `at`, `share` of all the model's heads that is taken, and `receivers`, the share that
    is patched into by later stages, `share` if absent. Heads that do not lower the answer's probability are not taken,
    so that the search ends where nothing leads further. A head found by two stages at one place stays in the later
    group. Pruned is by `audits.minimality`. The first half of the rows is searched with, the second measured on.

    Args:
        state: what the recipe has made so far, its model and data: rows with `positive` and `negative`.
        stages: see above.
        query: the place whose token "mention" is like.
        prune: leave out heads that are not needed.
        metric: "accuracy" or "probability".
        sets: random sets of `completeness`.
        limit: at most so many prompts (of ready batches: so many batches) are searched with.
        post: the changed model, a folder or a Hub id; the graft `of` if None.
        of: name of the graft.

    Returns:
        `circuit`, `where`, `paths` (stage -> scores), `minimality`, `faithfulness` (the same circuit in the base and
        in the changed model), `completeness`.

    Raises:
        RequestError: a stage that is not understood, or a first stage, or a pruned circuit, without a head.
    """
    model = state["model"]
    prompts, changed = prompts_of(state, limit), change_of(state, post, of)
    with as_found(model):
        found, paths = searched(model, prompts, stages, query=query, seed=state.get("common", {}).get("seed", 0))
        how: dict[str, Any] = {"reference": prompts.reference, "query": query, "metric": metric}
        made: dict[str, Any] = {"paths": paths}
        if prune:
            made["minimality"] = minimality(model, Graft(), prompts.test, circuit=found, **how)
            found = made["minimality"].pop("circuit")
        units_of(found)
        made["faithfulness"] = faithfulness(model, changed, prompts.test, circuit=found, **how)
        made["completeness"] = completeness(model, Graft(), prompts.test, circuit=found, sets=sets, **how)
    where = reduce(lambda a, b: a | b, (group.where for group in found.values()))
    return {"circuit": found, "where": where, **made}


def searched(
    model: nn.Module, prompts: Prompts, stages: Sequence[Mapping[str, Any]], *, query: str, seed: int = 0
) -> tuple[dict[str, Group], dict[str, Scores]]:
    """Return the groups that a greedy backward search finds, and the scores of every stage that was run."""
    context = Context(model, sites(model, "head"), prompts.clean, prompts.corrupt, seed=seed)
    total = sum(site.n for site in context.sites.values())
    paths: dict[str, Scores] = {}
    groups: dict[str, Group] = {}
    reached: dict[str, Selection] = {}
    for stage in stages:
        name, into = _checked(stage, groups), stage.get("into", "logits")
        receivers = None if into == "logits" else reached[stage["of"]]
        at = stage.get("at", "end")
        if receivers is not None and not len(receivers):
            groups[name], reached[name] = Group(receivers, at), receivers
            continue
        paths[name] = path_patching(context, receivers=receivers, into=into, at=at, query=query)
        chosen = _best(paths[name], stage["share"], total)
        if not len(chosen) and not groups:
            raise RequestError(
                f"the stage {name!r}, in which no head lowers the answer's probability",
                expected="prompts that the model answers",
                do="check the model's answers, and that the corrupt prompts ask for something else",
            )
        earlier = {n: g for n, g in groups.items() if g.at == at}
        groups |= {n: replace(g, where=g.where - chosen) for n, g in earlier.items()}
        groups[name] = Group(chosen, at)
        reached[name] = _best(paths[name], stage.get("receivers", stage["share"]), total)
    return groups, paths


def _best(scores: Scores, share: float, total: int) -> Selection:
    positive = sum(int((v > 0).sum()) for v in scores.values.values())
    count = min(positive, max(1, round(share * total)))
    return scores.top(count=count) if count else Selection.of(scores.sites, {}, {"rule": "none is positive"})


def _checked(stage: Mapping[str, Any], groups: Circuit) -> str:
    odd = [k for k in stage if k not in STAGE]
    missing = [k for k in ("name", "share") if k not in stage]
    if odd or missing or (stage.get("into", "logits") != "logits" and stage.get("of") not in groups):
        raise RequestError(
            f"the stage {dict(stage)}",
            expected=f"the keys {', '.join(STAGE)}; name and share always, and of an earlier stage's name",
            do=near(odd[0], STAGE) if odd else f"write it with {', '.join(missing) or 'of'}",
        )
    above(share=(stage["share"], 0), receivers=(stage.get("receivers"), 0))
    share(share=stage["share"], receivers=stage.get("receivers"))
    return str(stage["name"])


def prompts_of(state: Mapping[str, Any], limit: int) -> Prompts:
    """Return the run's pairs of prompts, the first half of the rows apart from the second."""
    options: Mapping[str, Any] = state.get("common", {})
    how = {"processing_class": options.get("processing_class")}
    data, model = state["data"], state["model"]
    if isinstance(data, Mapping) and data.keys() == {"positive", "negative"}:
        sides = {side: read_rows(rows) for side, rows in data.items()}
        cut = [{k: v[part] for k, v in sides.items()} for part in _halves(len(sides["positive"]), limit)]
        first, second = ((c["positive"], c["negative"]) for c in cut)
        both = [located_data({"positive": a, "negative": b}, model, **how) for a, b in (first, second)]
    else:
        rows = read_rows(data)
        both = [located_data(rows[part], model, **how) for part in _halves(len(rows), limit)]
    if not all(side for half in both for side in half):
        raise RequestError(
            "prompts without corrupt ones", expected="rows with `positive` and `negative`", do="give a corrupt prompt"
        )
    return Prompts(*both[0], *both[1])


def _halves(n: int, limit: int) -> tuple[slice, slice]:
    middle = min(limit, -(-n // 2))
    return (slice(0, middle), slice(middle, n)) if n > 1 else (slice(0, 1), slice(0, 1))


def change_of(state: Mapping[str, Any], post: Any, of: str) -> Any:
    """Return the changed model, or the graft of that name.

    Raises:
        RequestError: there is neither.
    """
    if post is not None:
        return load_model(post)
    if not isinstance(state.get(of), Graft):
        raise RequestError(f"no graft {of!r}", expected="a change to compare with", do="tune first, or pass post=")
    return state[of]
