"""A mixin that teaches any Trainer about grafts: objective, schedule, checkpoints, resume, best model."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neurograft.core.context import Step, shifts
from neurograft.core.errors import RequestError, RunError
from neurograft.core.expose import exposed
from neurograft.core.mount import Mount
from neurograft.core.selection import Selection
from neurograft.train import checkpoint
from neurograft.train.asked import Asked
from neurograft.train.conductor import Conductor
from neurograft.train.moved import Witness
from neurograft.train.optimizers import built, chosen, groups_of
from neurograft.train.steps import StepEvents, reference_of
from neurograft.train.trl import FusedStep, check_head, heads, is_trl

KEPT_LOSSES = 2000


class GraftTrainerMixin:
    """Stands before `transformers.Trainer` or `trl.SFTTrainer` in a class's bases; trains what a mount holds.

    Checkpoints hold the mount's tensors only, exactly (float32 also on a bfloat16 base), and carry a mark of
    completeness; a resume takes the newest complete one and continues bit for bit. The best model is loaded into
    the mount. Losses must be finite and every awake tensor must move, or the training raises.

    Args:
        *args: the Trainer's.
        mount: what is trained, attached to the Trainer's model; the mixin neither attaches nor detaches it.
        objective: what is asked: a choice of `objectives` or a callable (model, batch) -> loss. None leaves the
            Trainer's own loss alone.
        anchor: a second objective with a weight, or a list of them; see `Asked.of`.
        schedule: a choice of `schedules`.
        reselect: (model, step) -> Selection, for schedules that turn to other units.
        optimizer: an optimizer of `torch.optim` by name, a choice of `optimizers`, or None for the Trainer's.
        **kwargs: the Trainer's.

    Raises:
        RequestError: the mount is detached or on another model, or wraps the head of a TRL trainer.

    Example:
        >>> class GraftTrainer(GraftTrainerMixin, __import__("transformers").Trainer):
        ...     pass
    """

    def __init__(
        self,
        *args: Any,
        mount: Mount,
        objective: Any = None,
        anchor: Any = None,
        schedule: Any = None,
        reselect: Callable[[torch.nn.Module, int], Selection] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not mount.attached or mount.model is not model:
            raise RequestError(
                "a mount that is detached or on another model",
                expected="the mount of the trainer's model",
                do="with ng.attach(model, where) as mount: Trainer(model=model, mount=mount, ...)",
            )
        if anchor is not None and objective is None:
            raise RequestError("an anchor without an objective", expected="both", do="add objective='auto'")
        self.mount = mount
        self.asked = objective if objective is None or isinstance(objective, Asked) else Asked.of(objective, anchor)
        self.choice = None if optimizer is None else chosen(optimizer)
        self.window_loss: Tensor | None = None
        self.micro = 0
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise RequestError(
                "several devices in one process, for which the Trainer copies the model",
                expected="one device a process",
                do="launch with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES",
            )
        self.witness = Witness(mount)
        self.conductor = Conductor(
            schedule, mount, freeze=trainer.args.world_size == 1, reselect=reselect, witness=self.witness
        )
        trainer.add_callback(StepEvents(self))
        if is_trl(self):
            check_head(model, mount)
        if self.asked is not None:
            # Our losses are shares of the window's, so labels are always counted and nothing is divided afterwards.
            trainer.model_accepts_loss_kwargs = True
            trainer.loss_is_scaled_for_ga = True
            trainer._loss_shifts_labels = shifts(model)

    # ---- loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the objective's share of the accumulation window, and the outputs if asked for."""
        trainer: Any = self
        if self.asked is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        training = bool(trainer.model.training)
        world = trainer.args.world_size if trainer.args.average_tokens_across_devices else 1
        step, outputs = self._step(model, inputs, return_outputs, num_items_in_batch)
        windows = trainer.current_gradient_accumulation_steps if training else 1
        draw = trainer.state.global_step * trainer.args.gradient_accumulation_steps + self.micro
        loss = self.asked.loss(step, windows=windows, world=world, draw=draw, anchored=training)
        self.micro += training
        if return_outputs and outputs is None:
            outputs = step.__dict__.get("outputs") or step.__dict__.get("predictions")
        return (loss, outputs) if return_outputs else loss

    def _step(self, model: Any, inputs: dict[str, Any], return_outputs: bool, items: Any) -> tuple[Step, Any]:
        trainer: Any = self
        more = (trainer.state.global_step, trainer.state.max_steps, items, reference_of(self.mount))
        if not is_trl(self):
            batch, extra = _columns(trainer.model, inputs)
            return Step(trainer.model, batch, *more, extra, model), None
        held: dict[str, Any] = {}

        def once(**kwargs: Any) -> Any:
            found = model(**kwargs)
            if kwargs.get("fused_lm_head"):
                held["fused"] = found
            return found

        # TRL's own method runs the forward pass and keeps its metrics; its loss is not used.
        own = super().compute_loss(once, inputs, return_outputs, items)  # type: ignore[misc]
        step = FusedStep(trainer.model, inputs, *more, fused=held["fused"])
        return step, own[1] if return_outputs else None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do the Trainer's step and check its loss.

        Raises:
            RunError: the loss is not finite.
        """
        trainer: Any = self
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.witness.loss(loss, step=trainer.state.global_step + 1)
        self.window_loss = loss if self.window_loss is None else self.window_loss + loss
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self._settle()
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _settle(self) -> None:
        for name, parameter in self.mount.named_parameters().items():
            if self.conductor.phase.awake is not None and name not in self.conductor.phase.awake:
                parameter.grad = None

    # ---- training ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; see the class for what is checked.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint, or a folder.
            *args: the Trainer's.
            **kwargs: the Trainer's.

        Raises:
            RequestError: the checkpoint is not complete, or none is.
            RunError: a loss that is not finite, or a tensor that did not move.
        """
        trainer: Any = self
        if not self.mount.attached:
            raise RequestError("a detached mount", expected="an attached one", do="train inside the `with` block")
        found, skipped = checkpoint.to_resume(resume_from_checkpoint, trainer.args.output_dir)
        for name, why in skipped.items():
            warnings.warn(f"skipped {name}: {why}; resuming from {found}", stacklevel=2)
        self.resumed = {"from": None if found is None else found.name, "skipped": skipped}
        with exposed(heads(trainer.model) if is_trl(self) else ()):
            out = super().train(str(found) if found else None, *args, **kwargs)  # type: ignore[misc]
        self.conductor.end()
        nothing_left = found is not None and not self.witness.awake  # resumed at the end of a run that had turned
        self.moved = {"tensors": 0, "numbers": 0} if nothing_left else self.witness.check()
        return out

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the chosen optimizer over the mount's tensors, with the Trainer's rule for weight decay."""
        trainer: Any = self
        if trainer.optimizer is None and (self.choice is not None or self.conductor.schedule is not None):
            whole = trainer.model if model is None else model
            decay = set(trainer.get_decay_parameter_names(whole))
            names = {id(p): n in decay for n, p in whole.named_parameters()}
            mine = self.mount.named_parameters()
            groups = groups_of(
                mine,
                decay=[n for n, p in mine.items() if names.get(id(p), False)],
                weight_decay=trainer.args.weight_decay,
                apart=self.conductor.schedule is not None,
            )
            if self.choice is None:
                kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, whole)
                trainer.optimizer = kind(groups, **options)
            else:
                trainer.optimizer = built(self.choice, groups, lr=trainer.args.learning_rate)
        return super().create_optimizer(model)  # type: ignore[misc]

    # ---- checkpoints ------------------------------------------------------------------------------------------

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
        if self.witness.start.keys() != self.mount.named_parameters().keys() or any(
            self.witness.start[n].shape != p.shape for n, p in self.mount.named_parameters().items()
        ):
            self.witness.restart()  # the training had turned to other units
        else:
            self.witness.reached, self.witness.awake = set(state["reached"]), set(state["awake"])
        self.witness.losses = list(state["losses"])

    def _load_best_model(self) -> None:
        trainer: Any = self
        best = Path(trainer.state.best_model_checkpoint)
        why = checkpoint.fault(best)
        if why is not None:
            raise RunError(f"the best model's checkpoint {best} cannot be loaded: {why}")
        self.mount.load_state_dict(checkpoint.tensors(best))


def _columns(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part a batch into model inputs and other columns; a model that takes anything gets everything."""
    parameters = inspect.signature(model.forward).parameters
    named = {n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if not named:
        return dict(inputs), {}
    return {k: v for k, v in inputs.items() if k in named}, {k: v for k, v in inputs.items() if k not in named}
