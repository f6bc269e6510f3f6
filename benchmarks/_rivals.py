"""Who meets in the tables of selective tuning, and where: recipes, `ng.tune`, PEFT's methods, and a world for them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _costs import Costs
from torch import Tensor, nn
from transformers import Trainer

import neurograft as ng
from neurograft.pipeline.papers import card
from neurograft.pipeline.recipe import recipes

SELECTIVE = [
    "composable-sft",
    "lmm-skills",
    "neuroada",
    "lift",
    "surgical-lm",
    "biomed-stability",
    "layernorm-key",
    "block-expansion",
    "nfts",
    "mezo",
    "spafit",
    "sara",
    "spectral-layers",
    "hft",
    "fpf",
    "es-landscape",
    "gmt",
    "spider",
    "revffn",
    "sct",
    "lisa",
    "ramt",
    "smt",
    "slicefine",
    "s2ft",
]


@dataclass(frozen=True)
class World:
    """Where contenders meet.

    Args:
        base: seed -> the model before, to be left as found.
        rows: seed -> training rows.
        read: (model, seed) -> "validation" and "test" of the task, "known", the loss on what was known, and more.
        batch: rows of a step.
        task: PEFT's name of it.
        options: of recipes: sizes that fit so small a model.
        absent: contenders that are not run, or only when named, with the reason.
    """

    base: Callable[[int], nn.Module]
    rows: Callable[[int], list[dict[str, Tensor]]]
    read: Callable[[nn.Module, int], dict[str, float]]
    batch: int
    task: str | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)


class Tuned:
    """A change that can be looked at: a graft, or a model that PEFT trained."""

    def __init__(self, *, graft: ng.Graft | None = None, model: nn.Module | None = None, numbers: int, size: int):
        self.graft, self.model, self.numbers, self.size = graft, model, numbers, size

    def read(self, world: World, seed: int) -> dict[str, float]:
        """Return what the world reads of the changed model."""
        if self.graft is None:
            assert self.model is not None
            return world.read(self.model, seed)
        model = world.base(seed)
        with self.graft.on(model):
            return world.read(model, seed)


Contender = Callable[[World, int, dict[str, Any], Costs], Tuned]


def of_graft(graft: ng.Graft) -> Tuned:
    """Measure a graft's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(graft.save(Path(folder) / "graft"))
        size = sum(p.stat().st_size for p in path.rglob("*.safetensors"))
    return Tuned(graft=graft, numbers=graft.numel, size=size)


def row(name: str) -> Contender:
    """Return a paper's recipe as a contender."""

    def tune(world: World, seed: int, args: dict[str, Any], costs: Costs) -> Tuned:
        changes = {**world.options.get(name, {}), "tune.args": args, "tune.callbacks": (costs,)}
        return of_graft(ng.run(name, world.base(seed), world.rows(seed), changes=changes, seed=seed).graft)

    return tune


def ours(*, units: str | None = None, **options: Any) -> Contender:
    """Return `ng.tune` as a contender: of everything, or of a tenth of these units, drawn at random."""

    def tune(world: World, seed: int, args: dict[str, Any], costs: Costs) -> Tuned:
        model, where = world.base(seed), None
        if units:
            where = ng.locate(model, by="noise", units=units, seed=seed).top(fraction=0.1)
        adapter = "slice" if where is not None else "dense"
        given = {"adapter": adapter, "args": args, "callbacks": (costs,), "seed": seed, **options}
        return of_graft(ng.tune(model, world.rows(seed), where, **given))

    return tune


def peft(config: Callable[[World, int], Any]) -> Contender:
    """Return a method of PEFT in transformers' own Trainer as a contender."""

    def tune(world: World, seed: int, args: dict[str, Any], costs: Costs) -> Tuned:
        from peft import get_peft_model
        from transformers import PrinterCallback

        from neurograft.pipeline.collator import collator
        from neurograft.pipeline.tune import _arguments

        torch.manual_seed(seed)
        model = world.base(seed)
        wrapped = get_peft_model(deepcopy(model), config(world, seed))
        with tempfile.TemporaryDirectory() as folder:
            settings = _arguments(args, folder, seed)
            trainer = Trainer(
                model=wrapped,
                args=settings,
                train_dataset=world.rows(seed),
                data_collator=collator(model),
                callbacks=[costs],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            wrapped.save_pretrained(folder)
            size = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))
        numbers = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        return Tuned(model=wrapped, numbers=numbers, size=size)

    return tune


def _lora(world: World, seed: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type=world.task)


def _shira(world: World, seed: int) -> Any:
    from peft import ShiraConfig

    return ShiraConfig(r=2, random_seed=seed, target_modules="all-linear", task_type=world.task)


def _supertuning(world: World, seed: int) -> Any:
    from peft import SupertuningConfig

    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    there = {name.rpartition(".")[2] for name, _ in world.base(seed).named_modules()}
    return SupertuningConfig(target_modules=[t for t in targets if t in there], task_type=world.task)


def contenders() -> dict[str, Contender]:
    """Return the references and every recipe of selective tuning, by name."""
    found: dict[str, Contender] = {
        "full fine-tuning": ours(),
        "random neurons": ours(units="neuron"),
        "PEFT LoRA": peft(_lora),
        "PEFT SHiRA": peft(_shira),
        "PEFT Super-Tuning": peft(_supertuning),
    }
    return found | {name: row(name) for name in recipes() if card(name).paper in SELECTIVE or not card(name).paper}
