"""A mixin that teaches any Trainer about grafts: objective, schedule, checkpoints, resume, best model."""

from __future__ import annotations

import warnings
from typing import Any

from neurograft.core.compact.expose import exposed
from neurograft.core.compact.mount import Mount
from neurograft.core.context import shifts
from neurograft.core.errors import RequestError
from neurograft.train import checkpoint, together
from neurograft.train.asked import Asked
from neurograft.train.conductor import Conductor
from neurograft.train.mixin_files import Files
from neurograft.train.mixin_loss import Losses
from neurograft.train.moved import Witness
from neurograft.train.optimizers import built, chosen, forward_only, groups_of
from neurograft.train.steps import StepEvents, driven
from neurograft.train.together import Reselect
from neurograft.train.trl import check_head, heads, is_trl


class GraftTrainerMixin(Losses, Files):
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
        reselect: (model, step) -> Selection, for schedules that turn to other units. Several processes take the
            first one's answer; they average gradients themselves, since DDP holds on to the tensors it begins with.
        optimizer: an optimizer of `torch.optim` by name, a choice of `optimizers`, or None for the Trainer's.
        **kwargs: the Trainer's.

    Raises:
        RequestError: the mount is detached or on another model, or wraps the head of a TRL trainer.

    Example:
        >>> from transformers import Trainer
        >>> class GraftTrainer(GraftTrainerMixin, Trainer):
        ...     pass
    """

    def __init__(
        self,
        *args: Any,
        mount: Mount,
        objective: Any = None,
        anchor: Any = None,
        schedule: Any = None,
        reselect: Reselect | None = None,
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
        super().__init__(*args, **kwargs)
        self.witness = Witness(mount)
        self.conductor = self._conductor(schedule, reselect)
        trainer: Any = self
        trainer.add_callback(StepEvents(self))
        if is_trl(self):
            check_head(model, mount)
        if self.asked is not None:
            self._only_one_loss()
            # Our losses are shares of the window's, so labels are always counted and nothing is divided afterwards.
            trainer.model_accepts_loss_kwargs = True
            trainer.loss_is_scaled_for_ga = True
            trainer._loss_shifts_labels = shifts(model)

    def _conductor(self, schedule: Any, reselect: Reselect | None) -> Conductor:
        """Return what obeys the schedule, in one process or in several that agree."""
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise RequestError(
                "several devices in one process, for which the Trainer copies the model",
                expected="one device a process",
                do="launch with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES",
            )
        several = trainer.args.world_size > 1
        self.together = several and reselect is not None
        if self.together and reselect is not None:
            together.check_wrapping(trainer.accelerator)
            reselect = together.agreed(reselect)
        return Conductor(
            schedule,
            self.mount,
            freeze=not several or self.together,
            reselect=reselect,
            witness=self.witness,
            seed=trainer.args.seed,
        )

    def _only_one_loss(self) -> None:
        trainer: Any = self
        also = {
            "compute_loss_func": trainer.compute_loss_func is not None,
            "label_smoothing_factor": trainer.args.label_smoothing_factor != 0,
            "loss_type": getattr(trainer.args, "loss_type", "nll") not in ("nll", "chunked_nll"),
        }
        for name, given in also.items():
            if given:
                raise RequestError(
                    f"{name} beside an objective", expected="one of them", do="leave one out; objective=None keeps it"
                )

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
        self.moved = None
        try:
            with self._head():
                out = super().train(str(found) if found else None, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.conductor.end()
        if self.moved is None:
            self.moved = self._moved()
        return out

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict as the Trainer does; see `train`."""
        with self._head():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _head(self) -> Any:
        trainer: Any = self
        return exposed(heads(trainer.model) if is_trl(self) else ())

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:  # resumed at its end; the Trainer asks after a step
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.together:
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        with together.unwrapped(trainer.accelerator, self.mount.parameters()):
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]

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
                apart=self.conductor.schedule is not None or forward_only(self.choice),
            )
            if self.choice is None:
                kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, whole)
                trainer.optimizer = kind(groups, **options)
            else:
                trainer.optimizer = built(self.choice, groups, lr=trainer.args.learning_rate, seed=trainer.args.seed)
                if driven(self.mount, trainer.optimizer) and trainer.args.world_size > 1:
                    raise RequestError(
                        f"{self.choice.name} in {trainer.args.world_size} processes, which draw no common loss",
                        expected="one process",
                        do="gather what a larger batch needs with gradient_accumulation_steps",
                    )
        return super().create_optimizer(model)  # type: ignore[misc]
