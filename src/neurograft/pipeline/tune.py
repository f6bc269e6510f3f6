"""tune: learn from data with only the selected units moving, and return the change as a graft."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurograft.core.choose import Choice, Chosen, choose, option_names
from neurograft.core.compact.mount import Mount
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, near
from neurograft.core.grafts.graft import Graft
from neurograft.core.prompts.collate import collator
from neurograft.core.seeds import derive
from neurograft.core.selection import Selection
from neurograft.pipeline.attach import Where, attach, selection_of, takes
from neurograft.pipeline.inputs import as_batches, as_dataset, data_digest, processor_for
from neurograft.pipeline.locate import locate, select
from neurograft.pipeline.models import Model, load_model
from neurograft.train.asked import Asked
from neurograft.train.untouched import untouched

# What TrainingArguments leaves open or sets for other purposes; anything given in `args` comes first.
DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
    "disable_tqdm": True,
}
LOSSES_ON_CARD = 1000
CLOCKS = ("_runtime", "_per_second", "_preparation_time")  # never the same twice, as the card of a seed has to be
Ask = Mapping[str, Mapping[str, Any]]
Reselect = Ask | Sequence[Ask] | Callable[[nn.Module, int], Selection] | None


def tune(
    model: Model,
    data: Any,
    where: Where = None,
    *,
    adapter: Choice = "slice",
    objective: Choice = "auto",
    anchor: Choice | Sequence[Choice] = None,
    schedule: Choice = None,
    reselect: Reselect = None,
    optimizer: Choice = None,
    protect: Where = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    data_collator: Callable[[Sequence[Any]], Batch] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    args: Any = None,
    callbacks: Sequence[Any] = (),
    resume_from_checkpoint: bool | str | Path | None = None,
    new: Iterable[str] | Mapping[str, int] = (),
    max_length: int = 1024,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    seed: int = 0,
) -> Graft:
    """Train the selected units on data with `transformers.Trainer`, and return what changed.

    The model is left bit for bit as it was found; `graft.apply(model)` changes it.

    Args:
        model: a module, a folder, a Hub id or a shipped model.
        data: examples.
        where: a selection, or the path of a saved one; None trains everything (adapter="dense").
        adapter: in what shape the change is trained: a choice of `adapters`.
        objective: what is asked: a choice of `objectives`, or a callable (model, batch) -> loss.
        anchor: a second objective that holds the model back, or a list of them, with `weight` and `data` among
            its options: ("kl", {"weight": 0.5, "data": general}) keeps it near the base on general data,
            ("likelihood", {"data": old}) replays old data; without `data` it looks at the batch of the step.
        schedule: what is awake when: a choice of `schedules`.
        reselect: whom to ask when the schedule selects anew: a callable (model, step) -> Selection, or
            {"locate": {...}, "select": {...}}, the arguments of those verbs, or a list of such that take turns;
            `data` are the examples if not given, and a selector that has a `turn` is told how often its turn came.
            Values left behind stay in the model and stop moving, and the graft holds them too.
        optimizer: a name of `torch.optim`, a choice of `optimizers`, or None for AdamW as in TrainingArguments.
        protect: units whose numbers must not move.
        eval_dataset: examples for `eval_strategy` and `load_best_model_at_end` of `args`.
        processing_class: tokenizer or processor for raw data; the one saved with the model if None.
        data_collator: joins examples into a batch; padding with -100 labels if None.
        compute_metrics: as for the Trainer.
        args: a TrainingArguments, or a dict of its fields over these defaults: learning_rate 1e-3, one epoch,
            batches of 8. Weight decay pulls trained values towards 0, as in full fine-tuning.
        callbacks: the Trainer's.
        resume_from_checkpoint: True for the newest complete checkpoint in `output_dir`, or a folder.
        new: parameters the base's checkpoint lacks (patterns), trained whole; or name -> rows the base has.
        max_length: longer texts are cut.
        revision: of a Hub id.
        dtype: load the weights so.
        device_map: as for `from_pretrained`.
        seed: root of every random number: order, dropout, adapters' starts, anchors' draws. A `seed` in `args`, as a
            TrainingArguments always has one, names order and dropout instead.

    Returns:
        The graft; its card holds what was asked, of which data and units, with which losses.

    Raises:
        RequestError: an unknown method, option or training argument; a selection that touches nothing; data that
            cannot be read.
        RunError: the loss was not finite, no gradient reached a trained tensor, or it did not move.
    """
    net = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    chosen, protected = selection_of(where), selection_of(protect)
    if chosen is None and adapter == "slice":
        adapter = "dense"
    options = {"seed": seed} if takes(adapter, "seed") else {}
    processor = processor_for(net, processing_class)
    encode = {"processing_class": processor, "max_length": max_length, "seed": seed}
    rows = as_dataset(data, net, **encode)
    kept = None if eval_dataset is None else as_dataset(eval_dataset, net, **encode)
    asked = Asked.of(objective, anchor, prepare=lambda extra: as_batches(extra, net, **encode), seed=seed)
    with tempfile.TemporaryDirectory(prefix="neurograft-") as scratch, untouched(net):
        settings = _arguments(args, scratch, seed)
        if kept is None and settings.eval_strategy != "no":
            raise RequestError(
                f"eval_strategy={str(settings.eval_strategy.value)!r} without examples to evaluate on",
                expected="eval_dataset",
                do="pass eval_dataset=, or leave eval_strategy out",
            )
        with attach(net, chosen, adapter=adapter, new=new, protect=protected, **options) as mount:
            trainer = _trainer(
                net,
                mount,
                asked,
                settings,
                schedule=schedule,
                reselect=_asker(reselect, rows, seed, schedule),
                optimizer=optimizer,
                train_dataset=rows,
                eval_dataset=kept,
                data_collator=data_collator or collator(net, processor),
                compute_metrics=compute_metrics,
                callbacks=list(callbacks),
            )
            trainer.train(resume_from_checkpoint)
            card = _card(trainer, adapter, chosen, protected, settings, seed) | {"data": data_digest(rows)}
            return mount.graft(card=card)


def _asker(reselect: Reselect, rows: Any, seed: int, schedule: Any) -> Callable[[nn.Module, int], Selection] | None:
    if reselect is None or callable(reselect):
        return reselect
    asks = [reselect] if isinstance(reselect, Mapping) else list(reselect)
    for one in asks or [{}]:
        if set(one) - {"locate", "select"} or "locate" not in one:
            raise RequestError(
                f"reselect with {', '.join(sorted(one)) or 'nothing'}",
                expected="'locate' and 'select', each with that verb's arguments",
                do="reselect={'locate': {'by': 'grad_x_act'}, 'select': {'fraction': 0.01}}",
            )

    def ask(model: nn.Module, step: int) -> Selection:
        turn, whose = divmod(choose("schedules", schedule)(step, []).turn, len(asks))
        one = asks[whose]
        scores = locate(model, **{"data": rows, "seed": derive(seed, "reselect", step), **one["locate"]})
        how = dict(one.get("select", {}))
        if "turn" in option_names(choose("selectors", how.get("by", "top")).function):
            how["turn"] = turn
        return select(scores, **how)

    return ask


def _trainer(net: nn.Module, mount: Mount, asked: Asked, settings: Any, **more: Any) -> Any:
    from transformers import PrinterCallback, Trainer

    from neurograft.train.mixin import GraftTrainerMixin

    class GraftTrainer(GraftTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    trainer = GraftTrainer(model=net, args=settings, mount=mount, objective=asked, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(args: Any, scratch: str, seed: int) -> Any:
    from transformers import TrainingArguments

    if isinstance(args, TrainingArguments):
        return args
    if args is not None and not isinstance(args, Mapping):
        raise RequestError(
            f"args of type {type(args).__name__}",
            expected="a dict of fields of TrainingArguments, or one of them",
            do="args={'learning_rate': 1e-4}",
        )
    given = dict(args or {})
    known = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init}
    for name, value in given.items():
        if name not in known:
            raise RequestError(
                f"the training argument {name!r}", expected="a field of TrainingArguments", do=near(name, known)
            )
        odd = isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value))
        if type(known[name]) in (int, float) and odd:
            raise RequestError(f"{name}={value!r}", expected="a number", do=f"give one, as in {name}={known[name]}")
    if "output_dir" not in given and given.get("save_strategy", "no") != "no":
        raise RequestError(
            "checkpoints without a place for them", expected="output_dir among args", do="args={'output_dir': ...}"
        )
    if not torch.cuda.is_available():
        given.setdefault("dataloader_pin_memory", False)
    if "gradient_checkpointing" in given and "activation_checkpointing" not in given:
        given["activation_checkpointing"] = given.pop("gradient_checkpointing")
    try:
        return TrainingArguments(**{**DEFAULTS, "output_dir": scratch, "seed": seed, **given})
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"training arguments that do not go together ({str(error).splitlines()[0]})",
            expected="what TrainingArguments takes",
            do="change " + ", ".join(f"{k}={v!r}" for k, v in given.items()),
        ) from error


def _card(
    trainer: Any, adapter: Any, where: Selection | None, protect: Selection | None, settings: Any, seed: int
) -> dict[str, Any]:
    import transformers

    import neurograft

    usual = type(settings)(output_dir=settings.output_dir)
    plain = {k: v for k, v in settings.to_dict().items() if v != getattr(usual, k, None)}
    hidden = {
        "output_dir",
        "logging_dir",
        "run_name",
        "hub_token",
        "disable_tqdm",
        "report_to",
        "seed",
        "accelerator_config",
    }
    losses: list[float] = trainer.witness.losses
    every = max(1, -(-len(losses) // LOSSES_ON_CARD))
    chosen: Chosen = choose("adapters", adapter)
    return {
        "adapter": chosen.as_dict(),
        **trainer.asked.as_dict(),
        "optimizer": trainer.choice.as_dict() if trainer.choice else {"path": str(settings.optim), "options": {}},
        "schedule": trainer.conductor.schedule.as_dict() if trainer.conductor.schedule else None,
        "selection": None if where is None else {**where.card, "digest": where.digest, "units": len(where)},
        "protect": None if protect is None else {"digest": protect.digest, "units": len(protect)},
        "args": json.loads(json.dumps({k: v for k, v in plain.items() if k not in hidden}, default=str)),
        "seed": seed,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "losses": losses[::every],
        "losses_every": every,
        "moved": trainer.moved,
        "best": {"metric": trainer.state.best_metric, "step": trainer.state.best_global_step}
        if settings.load_best_model_at_end
        else None,
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
