"""Of what, on which data and with which versions an audit was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import neurograft
from neurograft.audits._changes import Change
from neurograft.core.context import Batch
from neurograft.core.grafts.origin import describe
from neurograft.core.prompts.examples import size
from neurograft.pipeline.inputs import data_digest


def provenance(
    model: nn.Module, change: Change, task: list[Batch] | None, domains: Mapping[str, list[Batch]], seed: int
) -> dict[str, Any]:
    """Return it as plain data.

    Args:
        model: the base.
        change: what was audited.
        task: data of the gain, or None.
        domains: kept domains by name.
        seed: root of every random number.
    """
    import transformers

    data = {**({"gain": task} if task is not None else {}), **domains}
    first = next(model.parameters(), None)
    return {
        "base": describe(model),
        "change": {
            "kind": "tuned model" if change.tuned is not None else "graft" if len(change.grafts) == 1 else "grafts",
            "grafts": [
                {
                    "identity": graft.identity,
                    "numbers": graft.numel,
                    "tensors": len(graft.deltas),
                    "strength": graft.strength,
                    "card": {k: v for k, v in graft.card.items() if k != "audit"},
                }
                for graft in change.grafts
            ],
        },
        "data": {
            name: {"items": sum(size(b) for b in batches), "digest": data_digest(batches)}
            for name, batches in data.items()
        },
        "seed": seed,
        "device": first.device.type if first is not None else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "neurograft": neurograft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
