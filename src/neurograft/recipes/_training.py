"""Training arguments as the papers state them."""

from __future__ import annotations

from typing import Any

from neurograft.core.ranges import above, least


def training(
    *, lr: float, epochs: float, batch: int, warmup: float, schedule: str = "linear", decay: float = 0.0, **more: Any
) -> dict[str, Any]:
    """Return fields of TrainingArguments; a warm-up below 1 is a share of the steps.

    Raises:
        RequestError: numbers with which nothing can be trained.
    """
    least(lr=(lr, 0), batch=(batch, 1), warmup=(warmup, 0), decay=(decay, 0))
    above(epochs=(epochs, 0))
    return {
        "learning_rate": lr,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "warmup_steps": warmup,
        "lr_scheduler_type": schedule,
        "weight_decay": decay,
        **more,
    }
