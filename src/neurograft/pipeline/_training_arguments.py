"""How a Trainer is told to train: TrainingArguments, of fields that are checked first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch

from neurograft.core.errors import RequestError, near

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What TrainingArguments leaves open or sets for other purposes; anything given in `args` comes first.
LEAST = {"learning_rate": 0, "weight_decay": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
         "gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 0}  # fmt: skip
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


def training_arguments(
    args: Any, scratch: str, seed: int, *, evaluated: bool, called_back: bool = False
) -> TrainingArguments:
    """Return TrainingArguments as they were given, or made of their fields.

    Args:
        args: a TrainingArguments, or fields over `DEFAULTS`, or None.
        scratch: the output folder, if no field names one.
        seed: of order and dropout, if no field names one.
        evaluated: whether there are examples to evaluate on.
        called_back: whether there are callbacks, which may ask for an evaluation.

    Raises:
        RequestError: an unknown field, one that is no number, fields that do not go together, or an evaluation without
            examples, or examples without one.
    """
    from transformers import TrainingArguments

    made: Any = args if isinstance(args, TrainingArguments) else _made({} if args is None else args, scratch, seed)
    if not evaluated and made.eval_strategy != "no":
        raise RequestError(
            f"eval_strategy={str(made.eval_strategy.value)!r} without examples to evaluate on",
            expected="eval_dataset",
            do="pass eval_dataset=, or leave eval_strategy out",
        )
    if not evaluated and made.load_best_model_at_end:
        raise RequestError(
            "load_best_model_at_end without examples to evaluate on", expected="eval_dataset", do="pass eval_dataset="
        )
    if evaluated and made.eval_strategy == "no" and not called_back:
        raise RequestError(
            "eval_dataset, and training arguments that never evaluate",
            expected="when to evaluate",
            do="give args={'eval_strategy': 'epoch'}, or leave eval_dataset out",
        )
    found: TrainingArguments = made
    return found


def _made(args: Any, scratch: str, seed: int) -> TrainingArguments:
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    if not isinstance(args, Mapping):
        raise RequestError(
            f"args of type {type(args).__name__}",
            expected="a dict of fields of TrainingArguments, or one of them",
            do="args={'learning_rate': 1e-4}",
        )
    given = {"seed": seed, **args}
    fields = [f for f in dataclasses.fields(TrainingArguments) if f.init]
    _check(given, {f.name: f.default for f in fields}, {f.name for f in fields if f.type in (int, "int")})
    if not torch.cuda.is_available():
        given.setdefault("dataloader_pin_memory", False)
    if "gradient_checkpointing" in given and "activation_checkpointing" not in given:
        given["activation_checkpointing"] = given.pop("gradient_checkpointing")
    try:
        made = TrainingArguments(**{**DEFAULTS, "output_dir": scratch, **given})
        get_reporting_integration_callbacks(made.report_to)
        return made
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        raise RequestError(
            f"training arguments that do not go together ({str(error).splitlines()[0]})",
            expected="what TrainingArguments takes",
            do="change " + ", ".join(f"{k}={v!r}" for k, v in args.items()),
        ) from error


def _check(given: Mapping[str, Any], known: Mapping[str, Any], whole: Container[str]) -> None:
    """Raise on fields that are unknown, no numbers where the defaults are, or ask for checkpoints nowhere.

    Args:
        given: fields.
        known: every field's default.
        whole: fields that are whole numbers.
    """
    for name, value in given.items():
        if name not in known:
            raise RequestError(
                f"the training argument {name!r}", expected="a field of TrainingArguments", do=near(name, known)
            )
        odd = isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value))
        if type(known[name]) in (int, float) and odd:
            raise RequestError(f"{name}={value!r}", expected="a number", do=f"give one, as in {name}={known[name]}")
        if name in whole and isinstance(value, float) and not value.is_integer():
            raise RequestError(
                f"{name}={value!r}", expected="a whole number", do=f"give one, as in {name}={known[name]}"
            )
        least = LEAST.get(name)
        if least is not None and isinstance(value, (int, float)) and value < least:
            raise RequestError(
                f"{name}={value!r}", expected=f"at least {least}", do=f"give one, as in {name}={known[name]}"
            )
    if not 0 <= given["seed"] < 2**32:
        raise RequestError(
            f"seed={given['seed']}", expected="0 to 2**32 - 1, as the Trainer takes it", do="give seed=0"
        )
    if given.get("max_steps") == 0 or given.get("num_train_epochs") == 0:
        raise RequestError(
            "training of no step", expected="at least one step", do="raise max_steps or num_train_epochs"
        )
    if "output_dir" not in given and given.get("save_strategy", "no") != "no":
        raise RequestError(
            "checkpoints without a place for them", expected="output_dir among args", do="args={'output_dir': ...}"
        )
