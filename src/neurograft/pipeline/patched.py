"""A step of recipes: the neurons through which a change acts along a direction, and the values to patch them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from neurograft.audits.decompose_change import along, table
from neurograft.core.errors import RequestError, one_of
from neurograft.core.kinds import LOWERING
from neurograft.core.selection import Scores
from neurograft.pipeline.inputs import as_batches
from neurograft.pipeline.models import load_model
from neurograft.pipeline.state import as_found


def patched(
    state: Mapping[str, Any],
    *,
    groups: Sequence[str] = LOWERING,
    post: Any = None,
    of: str = "graft",
    direction: str = "direction",
    data: Any = None,
    positions: str = "all",
) -> dict[str, Any]:
    """Return the groups' neurons as `where`, their means under the change as `values`, the shares as `decomposition`.

    Args:
        state: what the recipe has made so far, its model and data.
        groups: of `core.taps.projection`, whose neurons are taken.
        post: the changed model, a folder or a Hub id; the graft `of` if None.
        of: name of the graft.
        direction: name of scores of one site of residual channels: the direction.
        data: examples to measure on, instead of the run's.
        positions: which tokens count.

    Raises:
        RequestError: no direction, no group or an unknown one, or groups without a neuron.
    """
    scores, model = state.get(direction), state["model"]
    if not isinstance(scores, Scores) or len(scores.values) != 1:
        raise RequestError(
            f"the direction {direction!r}", expected="scores of one site of residual channels", do="locate them first"
        )
    if not groups:
        raise RequestError("no groups of neurons", expected="some of " + ", ".join(LOWERING), do="name one")
    for group in groups:
        one_of(group, LOWERING, what="group of neurons")
    (w,) = scores.values.values()
    options: Mapping[str, Any] = state.get("common", {})
    batches = as_batches(
        state["data"] if data is None else data, model, processing_class=options.get("processing_class")
    )
    with as_found(model):
        found = along(model, state[of] if post is None else load_model(post), batches, direction=w, positions=positions)
    mine = found.groups()
    where = reduce(lambda a, b: a | b, (mine[group] for group in groups))
    if not len(where):
        raise RequestError(
            f"the groups {', '.join(groups)}, which hold no neuron", expected="a change that moved some", do="tune more"
        )
    values = {name: found.after[name][ids].float() for name, ids in where.ids.items() if len(ids)}
    return {"where": where, "values": values, "decomposition": table(found)}
