"""What a change lost of a task: the following of its instruction, or the knowledge behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from neurograft.audits._changes import as_change, evaluating
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.grafts.graft import Graft
from neurograft.core.taps.end_states import answer_scores
from neurograft.core.taps.instructed import additions, at_prompt_end


@method(paper="instruction-vector", needs={"batches", "contrast", "labels"})
def instruction_split(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    contrast: Sequence[Batch],
    *,
    vector: Graft | None = None,
    measure: str = "probability",
) -> dict[str, Any]:
    """Measure P(y_c | c, x), the instruction's answer, and P(y | x), the plain completion, before and after a change.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model.
        batches: prompts with the instruction c, labelled with y_c.
        contrast: the same contents without it, labelled with what plainly follows, y.
        vector: a graft of `add` operations, such as the instruction's vector, put back under the change at the last
            prompt token of the batches.
        measure: "probability" of the answer's first token, or "nll", minus its mean negative log-likelihood.

    Returns:
        `instruction` and `knowledge`, each with `before`, `after` and `lost` (before - after); `share`, the
        instruction's part of what was lost, None if nothing was; with a vector `reinserted`, the instruction's answer
        with it, and `recovered`, which part of the instruction's loss it brings back, None if there was none.

    Raises:
        RequestError: rows without a labelled answer behind a prompt, a vector that is no set of additions.
    """
    made, operations = as_change(model, change), additions(vector)
    with evaluating(model, made.tuned):
        before = _both(model, batches, contrast, measure)
        with made.on() as changed:
            after = _both(changed, batches, contrast, measure)
            with at_prompt_end(changed, operations, None):
                again = float(answer_scores(changed, batches, measure).mean()) if operations else None
    found: dict[str, Any] = {
        name: {"before": a, "after": b, "lost": a - b}
        for name, a, b in zip(("instruction", "knowledge"), before, after)
    }
    lost = [max(0.0, found[name]["lost"]) for name in ("instruction", "knowledge")]
    found["share"] = lost[0] / sum(lost) if sum(lost) else None
    if again is not None:
        found |= {"reinserted": again, "recovered": (again - after[0]) / lost[0] if lost[0] else None}
    return found


def _both(model: nn.Module, *sides: Any) -> list[float]:
    *data, measure = sides
    return [float(answer_scores(model, batches, measure).mean()) for batches in data]
