"""What the card of a tuned graft says of its training."""

from __future__ import annotations

import json
from typing import Any

import torch

from neurograft.core.choose import choose
from neurograft.core.selection import Selection

LOSSES_ON_CARD = 1000
CLOCKS = ("_runtime", "_per_second", "_preparation_time")  # never the same twice, as the card of a seed has to be
HIDDEN = (
    "output_dir", "logging_dir", "run_name", "hub_token", "disable_tqdm", "report_to", "seed", "accelerator_config",
)  # fmt: skip


def tuned_card(
    trainer: Any, adapter: Any, where: Selection | None, protect: Selection | None, settings: Any, seed: int
) -> dict[str, Any]:
    """Return what was asked, of which units, with which losses, as plain data.

    Args:
        trainer: it has trained.
        adapter: the choice of one.
        where: the units, or None for all.
        protect: units that did not move.
        settings: the trainer's TrainingArguments.
        seed: root of every random number.
    """
    import transformers

    import neurograft

    losses: list[float] = trainer.witness.losses
    every = max(1, -(-len(losses) // LOSSES_ON_CARD))
    best = {"metric": trainer.state.best_metric, "step": trainer.state.best_global_step}
    return {
        "adapter": choose("adapters", adapter).as_dict(),
        **trainer.asked.as_dict(),
        "optimizer": trainer.choice.as_dict() if trainer.choice else {"path": str(settings.optim), "options": {}},
        "schedule": trainer.conductor.schedule.as_dict() if trainer.conductor.schedule else None,
        "selection": None if where is None else {**where.card, "digest": where.digest, "units": len(where)},
        "protect": None if protect is None else {"digest": protect.digest, "units": len(protect)},
        "args": _unusual(settings),
        "seed": seed,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "losses": losses[::every],
        "losses_every": every,
        "moved": trainer.moved,
        "best": best if settings.load_best_model_at_end else None,
        "evaluations": [
            {k: v for k, v in h.items() if not k.endswith(CLOCKS)}
            for h in trainer.state.log_history
            if any(k.startswith("eval_") for k in h)
        ],
        "skipped_checkpoints": trainer.resumed["skipped"],
        "versions": {
            "neurograft": neurograft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _unusual(settings: Any) -> dict[str, Any]:
    """Return the training arguments that are not their own defaults, but for those that change nothing."""
    usual = type(settings)(output_dir=settings.output_dir)
    plain = {k: v for k, v in settings.to_dict().items() if v != getattr(usual, k, None) and k not in HIDDEN}
    found: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return found
