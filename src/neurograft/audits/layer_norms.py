"""How large the weights of each layer are, and where along the depth a training moved them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from neurograft.anatomy.depth import depths
from neurograft.audits._changes import as_change
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.units import Parameters


@method(
    paper="lisa",
    departs="The paper averages the norm of a layer's weights over all steps; here over the changes that are given, "
    "such as grafts taken along a training.",
)
def layer_norms(model: nn.Module, change: object, batches: Sequence[Batch] = ()) -> dict[str, Any]:
    """Measure ||theta_l|| of every layer l, of the embeddings and of what lies behind, averaged over changes.

    Args:
        model: the base, of repeated layers.
        change: a graft or a tuned model, or a list of them taken along a training.
        batches: not read.

    Returns:
        `places`, from the bottom up: name, `norm_base`, `norm` and `change`, the norm of the difference; and
        `ends_share`, the share of the squared change that lies outside of the layers (0 if nothing changed).

    Raises:
        RequestError: no change, or a model without layers.
    """
    several = list(change) if isinstance(change, (list, tuple)) else [change]
    if not several:
        raise RequestError("no change", expected="one or more", do="give a graft, a tuned model, or a list")
    deep = depths(model)
    names = ["embeddings", *(f"layer {i}" for i in range(deep.layers)), "behind"]
    base = [0.0] * len(names)
    for name, weight in Parameters.of(model).by_name.items():
        base[deep.of(name)] += float(weight.detach().double().square().sum())
    norm, moved, squared = [0.0] * len(names), [0.0] * len(names), [0.0] * len(names)
    for one in several:
        now, far = list(base), [0.0] * len(names)
        for name, touched in as_change(model, one).weights.items():
            before, after = (v.detach().cpu().double() for v in (touched.before, touched.after))
            far[deep.of(name)] += float((after - before).square().sum())
            now[deep.of(name)] += float((after.square() - before.square()).sum())
        for i in range(len(names)):
            norm[i] += max(now[i], 0.0) ** 0.5 / len(several)
            moved[i] += far[i] ** 0.5 / len(several)
            squared[i] += far[i] / len(several)
    places = [{"name": n, "norm_base": b**0.5, "norm": v, "change": m} for n, b, v, m in zip(names, base, norm, moved)]
    return {"places": places, "ends_share": (squared[0] + squared[-1]) / sum(squared) if any(squared) else 0.0}
