"""For people with a Trainer of their own: the graft beside each of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from neurograft.core.compact.mount import Mount
from neurograft.core.errors import RequestError


class GraftCallback(TrainerCallback):
    """Writes what has been trained so far as a graft into `checkpoint-N/graft`.

    The Trainer's own checkpoint stays what it was: the whole model. To resume bit for bit on a bfloat16 base,
    whose checkpoint rounds the trained values, use `GraftTrainerMixin`.

    Args:
        mount: what is trained.
        card: plain data for the graft's card.
    """

    def __init__(self, mount: Mount, *, card: Mapping[str, Any] | None = None) -> None:
        self.mount, self.card = mount, dict(card or {})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the mount is on.

        Raises:
            RequestError: it was detached.
        """
        if not self.mount.attached:
            raise RequestError("a detached mount", expected="an attached one", do="train inside the `with` block")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the graft."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "graft"
            self.mount.graft(card={**self.card, "steps": state.global_step}).save(folder)
