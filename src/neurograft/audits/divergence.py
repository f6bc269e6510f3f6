"""How far the predictions moved, whatever the labels say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from neurograft.audits._averages import Average, averages
from neurograft.audits._measures import overview
from neurograft.audits._paired import Runs, runs
from neurograft.core.card import method
from neurograft.core.context import Batch


@method(
    needs={"batches", "labels"},
    claims={"empty_is_zero", "noise_floor"},
    departs="forgetting_ce, the cross-entropy to the base's own distribution of arXiv 2401.05605, is reported beside "
    "KL(base || changed); it starts at the base's entropy, the KL at 0",
)
def divergence(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    nulls: int = 8,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    measured: Runs | None = None,
) -> dict[str, Any]:
    """Measure KL(base || changed), KL(changed || base), changed top choices and entropy at the labelled places.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model.
        batches: data; labels only say which places count.
        nulls: how many random changes of the same size the noise floor is measured with.
        level: of the intervals, from a bootstrap over items.
        draws: of the bootstrap.
        seed: of bootstrap and nulls.
        measured: the paired runs, where they have been made.

    Returns:
        `measures`: "kl", "kl_reverse", "flips", "entropy"; `forgetting_ce` = mean of H(p_base, p_changed).
    """
    measured = runs(model, change, batches, nulls=nulls, seed=seed) if measured is None else measured
    options: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    seen, paired = overview(measured), measured["change"]
    nats = f"nats per {seen['place']}"
    wanted = {
        "kl": Average(nats, "zero", lambda p: p.kl),
        "kl_reverse": Average(nats, "zero", lambda p: p.kl_reverse),
        "flips": Average(f"share of {seen['place']}s", "zero", lambda p: p.flip),
        "entropy": Average(nats, "zero", base=lambda p: p.base_entropy, new=lambda p: p.new_entropy),
    }
    return {
        **seen,
        "measures": averages(measured, wanted, **options),
        "forgetting_ce": float((paired.base_entropy.double() + paired.kl.double()).mean()),
    }
