"""The same training with several seeds: how good on average, how different, and how many runs failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neurograft.audits._changes import as_change, evaluating
from neurograft.audits._scoring import scored
from neurograft.core.card import method
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError


@method(paper="biomed-stability", needs={"batches", "labels"})
def stability(model: nn.Module, changes: Sequence[object], batches: Sequence[Batch]) -> dict[str, Any]:
    """Compare runs that differ in their seed alone, by accuracy on labelled places.

    A run has failed if it is no better than always naming the commonest label.

    Args:
        model: the base.
        changes: a graft, or a tuned model, of each run.
        batches: data with labels.

    Returns:
        `accuracy` of each run, `mean`, `std` (with n - 1), `failed`, the share of failed runs, and `majority`, the
        accuracy of the commonest label.

    Raises:
        RequestError: fewer than two runs, or no data.
    """
    if len(changes) < 2 or not batches:
        raise RequestError(
            f"{len(changes)} runs and {len(batches)} batches", expected="two runs or more, and data", do="give both"
        )
    found: list[float] = []
    labels: Counter[int] = Counter()
    for number, change in enumerate(changes):
        made, right, places = as_change(model, change), 0, 0
        with evaluating(model, made.tuned), made.on() as changed:
            for batch in batches:
                read = scored(changed, batch)
                right += int(read.right.sum())
                places += len(read.labels)
                if number == 0:
                    labels.update(read.labels.tolist())
        found.append(right / places)
    values, majority = torch.tensor(found, dtype=torch.float64), max(labels.values()) / sum(labels.values())
    return {
        "accuracy": found,
        "mean": float(values.mean()),
        "std": float(values.std()),
        "failed": sum(v <= majority for v in found) / len(found),
        "majority": majority,
    }
