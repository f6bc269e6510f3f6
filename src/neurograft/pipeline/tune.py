"""tune: learn from data with only the selected units moving, and return the change as a graft."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurograft.core.choose import Choice
from neurograft.core.compact.mount import Mount
from neurograft.core.context import Batch
from neurograft.core.grafts.graft import Graft
from neurograft.core.prompts.collate import collator
from neurograft.pipeline._reselecting import Reselect, asker
from neurograft.pipeline._training_arguments import training_arguments
from neurograft.pipeline._tuned_card import tuned_card
from neurograft.pipeline.attach import Where, attach, selection_of, takes
from neurograft.pipeline.inputs import as_batches, as_dataset, data_digest, processor_for
from neurograft.pipeline.models import Model, load_model
from neurograft.train.asked import Asked
from neurograft.train.untouched import untouched


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
        settings = training_arguments(args, scratch, seed, evaluated=kept is not None, called_back=bool(callbacks))
        with attach(net, chosen, adapter=adapter, new=new, protect=protected, **options) as mount:
            trainer = _trainer(
                net,
                mount,
                asked,
                settings,
                schedule=schedule,
                reselect=asker(reselect, rows, seed, schedule),
                optimizer=optimizer,
                train_dataset=rows,
                eval_dataset=kept,
                data_collator=data_collator or collator(net, processor),
                compute_metrics=compute_metrics,
                callbacks=list(callbacks),
            )
            trainer.train(resume_from_checkpoint)
            card = tuned_card(trainer, adapter, chosen, protected, settings, seed) | {"data": data_digest(rows)}
            return mount.graft(card=card)


def _trainer(net: nn.Module, mount: Mount, asked: Asked, settings: Any, **more: Any) -> Any:
    from transformers import PrinterCallback, Trainer

    from neurograft.train.mixin import GraftTrainerMixin

    class GraftTrainer(GraftTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    trainer = GraftTrainer(model=net, args=settings, mount=mount, objective=asked, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer
