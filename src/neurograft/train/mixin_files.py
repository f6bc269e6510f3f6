"""The half of `GraftTrainerMixin` that writes and reads checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neurograft.core.compact.mount import Mount
from neurograft.core.errors import RequestError, RunError
from neurograft.train import checkpoint
from neurograft.train.conductor import Conductor
from neurograft.train.moved import Witness

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
IDS = "ids"  # beside moments of some numbers of a tensor alone: which


class Files:
    """Keeps the mount's tensors only, marks complete checkpoints, and loads them back into the mount."""

    mount: Mount
    conductor: Conductor
    witness: Witness
    resumed: dict[str, Any]
    moved: dict[str, Any] | None = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        if not trainer.args.should_save:
            return
        losses = self.witness.losses
        checkpoint.write(
            Path(output_dir or trainer.args.output_dir),
            self.mount,
            {
                "losses": losses,
                "reached": sorted(self.witness.reached),
                "awake": sorted(self.witness.awake),
                "schedule": None if self.conductor.schedule is None else self.conductor.schedule.as_dict(),
                "stage": self.conductor.phase.stage,
            },
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the graft that has been trained so far, as `Graft.save` does."""
        trainer: Any = self
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)  # type: ignore[misc]
        elif trainer.args.should_save:
            self.mount.graft().save(output_dir or trainer.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, mark it complete, and only then delete older ones."""
        trainer: Any = self
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            trainer.args.save_total_limit = limit
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            from transformers.trainer_utils import rotate_checkpoints

            run = trainer._get_output_dir(trial=trial)
            checkpoint.mark(Path(run) / f"checkpoint-{trainer.state.global_step}")
            rotate_checkpoints(
                output_dir=run,
                save_total_limit=limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = checkpoint.read(Path(resume_from_checkpoint), self.mount)
        asked = None if self.conductor.schedule is None else self.conductor.schedule.as_dict()
        if json.loads(json.dumps(asked)) != state.get("schedule"):
            raise RequestError(
                f"the schedule {asked} for a checkpoint made with {state.get('schedule')}",
                expected="the same schedule",
                do="resume with the schedule the run began with",
            )
        if getattr(self.mount, "turned", False):
            self.witness.restart()  # on other units, whose tensors may have the first ones' shapes
        else:
            self.witness.reached, self.witness.awake = set(state["reached"]), set(state["awake"])
        self.witness.losses = list(state["losses"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        trainer: Any = self
        if checkpoint is None or trainer.optimizer is None:
            return
        for name, parameter in self.mount.named_parameters().items():
            held = trainer.optimizer.state.get(parameter, {})
            wanted = held.get(IDS, parameter).shape
            odd = [tuple(held[k].shape) for k in MOMENTS if k in held and held[k].shape != wanted]
            if odd:  # a fused optimizer would write past its end
                raise RequestError(
                    f"moments of shape {odd[0]} in {checkpoint} for {name} of shape {tuple(parameter.shape)}",
                    expected="the state of this training's tensors",
                    do="resume with the selection, the adapter and the schedule the run began with",
                )

    def _load_best_model(self) -> None:
        trainer: Any = self
        best = Path(trainer.state.best_model_checkpoint)
        why = checkpoint.fault(best)
        if why is not None:
            raise RunError(f"the best model's checkpoint {best} cannot be loaded: {why}")
        self.moved = self._moved()  # of the training; the best may be of the units before a turn
        self.mount.load_state_dict(checkpoint.tensors(best))

    def _moved(self) -> dict[str, Any]:
        if self.resumed["from"] is not None and not self.witness.awake:  # at the end of a run that had turned
            return {"tensors": 0, "numbers": 0}
        return self.witness.check()
