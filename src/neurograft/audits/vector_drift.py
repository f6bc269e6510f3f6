"""How far a change moved an instruction's vector, and whether the same heads carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.anatomy.sites import sites
from neurograft.audits._changes import as_change, evaluating
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.selection import Scores, Selection
from neurograft.core.taps.end_states import best, effects, end_means, joint
from neurograft.core.units import Site


@method(paper="instruction-vector", kinds={"head"}, needs={"batches", "contrast", "labels", "taps"})
def vector_drift(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    contrast: Sequence[Batch],
    *,
    count: int | None = None,
    measure: str = "probability",
) -> dict[str, Any]:
    """Compare theta = sum over the best heads of W_o^h hbar_h, and the set of these heads, before and after a change.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model.
        batches: prompts with the instruction, labelled with its answers.
        contrast: such prompts without it, labelled with the instructed answers.
        count: heads of the vector; 10 if None, or all of a model that has fewer.
        measure: what ranks the heads, see `locators.causal_effect`.

    Returns:
        `cosine` of theta before and after, both of the base's heads; `cosine_own`, each of its own; `norm` before and
        after; `heads` before and after, as site and unit; `overlap`: shared, jaccard, the shared ones expected by
        chance and the chance of so many.

    Raises:
        RequestError: rows without a labelled answer behind a prompt, a count of more heads than there are.
    """
    made, where = as_change(model, change), sites(model, "head")
    with evaluating(model, made.tuned):
        first, values = _heads(model, where, batches, contrast, count, measure)
        before = joint(model, first, values)
        with made.on() as changed:
            second, values = _heads(changed, where, batches, contrast, count, measure)
            after, own = joint(changed, first, values), joint(changed, second, values)
    return {
        "cosine": float(F.cosine_similarity(before, after, dim=0)),
        "cosine_own": float(F.cosine_similarity(before, own, dim=0)),
        "norm": {"before": float(before.norm()), "after": float(after.norm())},
        "heads": {"before": _listed(first), "after": _listed(second)},
        "overlap": first.overlap(second),
    }


def _heads(
    model: nn.Module,
    where: Mapping[str, Site],
    batches: Sequence[Batch],
    contrast: Sequence[Batch],
    count: int | None,
    measure: str,
) -> tuple[Selection, dict[str, Tensor]]:
    values = end_means(model, where, batches)
    found = effects(model, where, contrast, values, measure=measure)
    return best(Scores(where, {name: gain.float() for name, gain in found.items()}), count), values


def _listed(heads: Selection) -> list[dict[str, Any]]:
    return [{"site": name, "unit": int(i)} for name, ids in heads.ids.items() for i in ids]
