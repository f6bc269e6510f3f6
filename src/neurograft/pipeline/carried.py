"""Steps of recipes: which variable each group of a circuit carries, and what of a change's gain it brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.anatomy.sites import sites
from neurograft.audits.cross_model import cross_model
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.taps.circuit import Circuit
from neurograft.locators.dcm import dcm
from neurograft.pipeline.circuit import change_of, prompts_of
from neurograft.pipeline.given import located_data
from neurograft.pipeline.state import as_found


def carried(
    state: Mapping[str, Any],
    *,
    desiderata: Mapping[str, Any],
    query: str = "end-2",
    lam: float = 0.01,
    lr: float = 0.1,
    epochs: int = 2,
    batch: int = 32,
) -> dict[str, Any]:
    """Return as `carried` what masks over each group say of each variable; see `locators.dcm`.

    Args:
        state: what the recipe has made so far, with its model and `circuit`.
        desiderata: variable -> rows whose `positive` is a base prompt with the answer wanted once the variable is
            patched, and whose `negative` is the counterfactual prompt.
        query: the place whose token "mention" is like.
        lam: price of a patched head.
        lr: learning rate.
        epochs: passes.
        batch: pairs in a batch.

    Returns:
        `carried`: group -> variable -> `where` (the heads that carry it), `scores` and `accuracy`; empty groups left
        out.

    Raises:
        RequestError: no circuit, or rows without pairs.
    """
    model, found = state["model"], _circuit(state)
    options: Mapping[str, Any] = state.get("common", {})
    how = {"processing_class": options.get("processing_class"), "batch_size": batch}
    learning: dict[str, Any] = {"query": query, "lam": lam, "lr": lr, "epochs": epochs}
    told: dict[str, dict[str, Any]] = {name: {} for name, group in found.items() if len(group.where)}
    with as_found(model):
        where = sites(model, "head")
        for variable, rows in desiderata.items():
            base, other = located_data(rows, model, **how)
            context = Context(model, where, base, other, seed=options.get("seed", 0))
            for name, mine in told.items():
                group = found[name]
                scores = dcm(context, heads=group.where, at=group.at, batch_size=batch, **learning)
                heads = {s: (v > 0.5).nonzero()[:, 0] for s, v in scores.values.items()}
                mine[variable] = {
                    "where": type(group.where).of(where, heads, {"rule": "dcm", "of": [group.where.digest]}),
                    "scores": scores,
                    "accuracy": scores.card["accuracy"],
                }
    return {"carried": told}


def brought(
    state: Mapping[str, Any],
    *,
    ways: Sequence[str] = ("out", "q", "k", "v"),
    query: str = "end-2",
    metric: str = "accuracy",
    limit: int = 300,
    post: Any = None,
    of: str = "graft",
) -> dict[str, Any]:
    """Return as `cmap` what of a change's gain each group of the circuit brings into the base; see `cross_model`.

    Args:
        state: what the recipe has made so far, with its model, data and `circuit`.
        ways: what of the heads is patched.
        query: the place whose token "mention" is like.
        metric: "accuracy" or "probability".
        limit: as for `circuit`: measured is on the rows that were not searched with.
        post: the changed model; the graft `of` if None.
        of: name of the graft.
    """
    model, found, changed = state["model"], _circuit(state), change_of(state, post, of)
    full = {name: group for name, group in found.items() if len(group.where)}
    with as_found(model):
        test = prompts_of(state, limit).test
        return {"cmap": cross_model(model, changed, test, circuit=full, ways=ways, query=query, metric=metric)}


def _circuit(state: Mapping[str, Any]) -> Circuit:
    found: Circuit | None = state.get("circuit")
    if not found:
        raise RequestError("no circuit", expected="one of an earlier step", do="put neurograft.pipeline.circuit first")
    return found
