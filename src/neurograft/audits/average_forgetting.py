"""What a change costs on several benchmarks, as one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from neurograft.audits._paired import Metric
from neurograft.audits.gain import gain
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError


@method(paper="loki", needs={"batches", "labels"})
def average_forgetting(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch] = (),
    *,
    groups: Mapping[str, Sequence[Batch]] | None = None,
    by: str = "accuracy",
    metrics: Metric | Mapping[str, Metric] | None = None,
) -> dict[str, Any]:
    """Return the average relative degradation in percent: 100 / N * sum over benchmarks of (before - after) / before.

    Negative where the change does better than the base. A relative number hides how small a base's score is; those of
    each benchmark stand beside it.

    Args:
        model: the base; left as found.
        change: a graft, grafts, or a tuned model.
        batches: one benchmark, named "all", if no groups are given.
        groups: benchmark -> labelled batches.
        by: the score, higher is better: "accuracy" or "exact" of `audits.gain`, or the name of a metric.
        metrics: as for `audits.gain`.

    Returns:
        `average`, and `benchmarks`: name -> before, after, degradation, in percent.

    Raises:
        RequestError: no data, an unknown score, or a base that scores 0 or less, of which no share can be lost.
    """
    found = {}
    for name, mine in (groups or {"all": batches}).items():
        if not mine:
            raise RequestError(f"no batches for {name!r}", expected="data of every benchmark", do="give labelled data")
        score = gain(model, change, mine, by=by, metrics=metrics, nulls=0)["measures"][by]
        before, after = score["base"], score["changed"]
        if before is None or before <= 0:
            raise RequestError(
                f"a base that scores {before} on {name!r}",
                expected="a score above 0, of which a share can be lost",
                do="leave the benchmark out, or choose another score: by=",
            )
        found[name] = {"before": before, "after": after, "degradation": 100 * (before - after) / before}
    return {"average": sum(b["degradation"] for b in found.values()) / len(found), "benchmarks": found}
