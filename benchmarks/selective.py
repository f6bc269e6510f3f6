"""What selective tuning costs and buys: every row of the papers about it, one model, one task, one sweep.

    python benchmarks/selective.py [--seeds 3] [--steps 120] [--only NAME ...] [--picture FILE]

A tiny Llama (hidden 64, FFN 128, 4 layers, about 170,000 numbers) that copies and reverses letters learns to say in
which third of the alphabet the first letter is. Every contender sees the same 40 batches of 32 rows in the same order,
AdamW or what its paper asks for, and the same learning rates; the one with the best accuracy on validation rows
counts, and test rows are read at that one alone. Kept: the loss on what the model knew.

Costs are those of the training itself: seconds of a step beside full fine-tuning in turn with it, bytes autograd saves
for one step, bytes of gradients when the optimizer steps, of the optimizer's state at the end, numbers in the graft
and its file. What was trained before (a first full phase, a search) is in `all_steps`. A model this small says little
about time: most of a step is overhead, and the checked-in numbers come from five runs on two cores that were
both busy.

Beside the rows: full fine-tuning, PEFT's LoRA, SHiRA and Super-Tuning, and random neurons.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, environment, interval, table, write
from _pareto import picture
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import neurograft as ng
from neurograft.core.context import Step
from neurograft.core.errors import RequestError, RunError
from neurograft.core.meter import saved
from neurograft.pipeline.papers import card
from neurograft.pipeline.recipe import recipes
from neurograft.worlds.mixture import mixture
from neurograft.worlds.tiny import fit as learn
from neurograft.worlds.tiny import llama

KNOWN, TASK, BATCH = ("copy", "reverse"), "first", 32
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
# The papers' sizes are those of models ten thousand times larger.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "smt": {"block": 8, "fraction": 0.05},
    "s2ft": {"fraction": 0.1},
    "lift": {"r": 8, "budget": 4, "interval": 20},
    "spafit": {"middle": "norm", "r": 4},
    "lisa": {"gamma": 1, "K": 10},
}


@cache
def base(seed: int) -> nn.Module:
    """Return the model that knows how to copy and to reverse; to be left as found."""
    model = llama(seed, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_key_value_heads=4)
    return learn(model, mixture(KNOWN, count=400, batch=BATCH, length=3, seed=seed), lr=4e-3)


@cache
def rows(seed: int) -> list[dict[str, Tensor]]:
    """Return training rows."""
    batches = mixture((TASK,), count=40, batch=BATCH, length=3, seed=50 + seed)
    return [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(BATCH)]


def accuracy(model: nn.Module, *, seed: int) -> float:
    """Return the share of right answers to 512 rows of the task."""
    with torch.no_grad():
        logits, labels = Step(model.eval(), mixture((TASK,), count=1, batch=512, length=3, seed=seed)[0]).scored()
    return float((logits.argmax(-1) == labels).float().mean())


def known(model: nn.Module) -> float:
    """Return the loss on what the model knew."""
    with torch.no_grad():
        step = Step(model.eval(), mixture(KNOWN, count=1, batch=512, length=3, seed=91)[0])
        return float(step.log_probs.mean().neg())


class Costs(TrainerCallback):
    """What a training takes, read where the Trainer passes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.gradients, self.state, self.saved, self.began = 0, 0, 0, 0.0
        self.watching: ExitStack | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; in the second step watch what autograd saves instead."""
        if len(self.seconds) == 1:
            self.watching = ExitStack()
            meter = self.watching.enter_context(saved(kwargs["model"]))
            self.watching.callback(lambda: setattr(self, "saved", meter.bytes))
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the gradients that are there when the optimizer steps."""
        self._seen()
        held = [p.grad for g in kwargs["optimizer"].param_groups for p in g["params"] if p.grad is not None]
        self.gradients = max(self.gradients, sum(g.nbytes for g in held))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock and count the optimizer's state."""
        self._seen()
        self.seconds.append(time.perf_counter() - self.began)
        tensors = [v for s in kwargs["optimizer"].state.values() for v in s.values() if isinstance(v, Tensor)]
        self.state = max(self.state, sum(t.nbytes for t in tensors))

    def _seen(self) -> None:
        if self.watching is not None:
            self.watching.close()
            self.watching = None


Contender = Callable[[nn.Module, int, dict[str, Any], Costs], "Tuned"]


class Tuned:
    """A change that can be looked at: a graft, or a model that PEFT trained."""

    def __init__(self, *, graft: ng.Graft | None = None, model: nn.Module | None = None, numbers: int, size: int):
        self.graft, self.model, self.numbers, self.size = graft, model, numbers, size

    def read(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Return validation and test accuracy and the loss on what was known."""
        if self.graft is None:
            assert self.model is not None
            return _read(self.model)
        with self.graft.on(model):
            return _read(model)


def _read(model: nn.Module) -> dict[str, float]:
    return {"validation": accuracy(model, seed=92), "test": accuracy(model, seed=93), "known": known(model)}


def of_graft(graft: ng.Graft) -> Tuned:
    """Measure a graft's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(graft.save(Path(folder) / "graft"))
        size = sum(p.stat().st_size for p in path.rglob("*.safetensors"))
    return Tuned(graft=graft, numbers=graft.numel, size=size)


def row(name: str) -> Contender:
    """Return a paper's recipe as a contender."""

    def tune(model: nn.Module, seed: int, args: dict[str, Any], costs: Costs) -> Tuned:
        changes = {**OPTIONS.get(name, {}), "tune.args": args, "tune.callbacks": (costs,)}
        return of_graft(ng.run(name, model, rows(seed), changes=changes, seed=seed).graft)

    return tune


def ours(**options: Any) -> Contender:
    """Return `ng.tune` with these options as a contender."""

    def tune(model: nn.Module, seed: int, args: dict[str, Any], costs: Costs) -> Tuned:
        where = None
        if options.get("units"):
            where = ng.locate(model, by="noise", units=options["units"], seed=seed).top(fraction=0.1)
        adapter = options.get("adapter", "slice" if where is not None else "dense")
        graft = ng.tune(model, rows(seed), where, adapter=adapter, args=args, callbacks=(costs,), seed=seed)
        return of_graft(graft)

    return tune


def peft(config: Callable[[int], Any]) -> Contender:
    """Return a method of PEFT in transformers' own Trainer as a contender."""

    def tune(model: nn.Module, seed: int, args: dict[str, Any], costs: Costs) -> Tuned:
        from peft import get_peft_model
        from transformers import PrinterCallback

        from neurograft.pipeline.inputs import collator
        from neurograft.pipeline.tune import _arguments

        torch.manual_seed(seed)
        wrapped = get_peft_model(deepcopy(model), config(seed))
        with tempfile.TemporaryDirectory() as folder:
            settings = _arguments(args, folder, seed)
            trainer = Trainer(
                model=wrapped, args=settings, train_dataset=rows(seed), data_collator=collator(model), callbacks=[costs]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            wrapped.save_pretrained(folder)
            size = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))
        numbers = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        return Tuned(model=wrapped, numbers=numbers, size=size)

    return tune


def _lora(seed: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def _shira(seed: int) -> Any:
    from peft import ShiraConfig

    return ShiraConfig(r=2, random_seed=seed, target_modules="all-linear", task_type="CAUSAL_LM")


def _supertuning(seed: int) -> Any:
    from peft import SupertuningConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return SupertuningConfig(target_modules=targets, task_type="CAUSAL_LM")


def contenders() -> dict[str, Contender]:
    """Return the references and every recipe for decoders, by name."""
    found: dict[str, Contender] = {
        "full fine-tuning": ours(),
        "random neurons": ours(units="neuron"),
        "PEFT LoRA": peft(_lora),
        "PEFT SHiRA": peft(_shira),
        "PEFT Super-Tuning": peft(_supertuning),
    }
    return found | {name: row(name) for name in recipes() if card(name).paper in SELECTIVE or not card(name).paper}


# Contenders that run only when they are named.
SLOW: Mapping[str, str] = {"es_landscape": "30 perturbed models a step, half an hour: --only es_landscape"}
# Rows for other networks and data than the table's.
ELSEWHERE: Mapping[str, str] = {"nfts": "a search over episodes of images, on a ViT and a ResNet: see its page"}
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


def measured(name: str, tune: Contender, seeds: int, steps: int, rates: Sequence[float]) -> dict[str, Any]:
    """Return a contender's numbers, one for each seed, at the rate that validation chose; or why it has none."""
    full, found = ours(), dict[str, list[float]]()
    for seed in range(seeds):
        model, best = base(seed), dict[str, float]()
        for rate in rates:
            args = {
                "learning_rate": rate,
                "max_steps": steps,
                "per_device_train_batch_size": BATCH,
                "warmup_steps": 10,
                "lr_scheduler_type": "linear",
            }
            costs, beside = Costs(), Costs()
            try:
                tuned = tune(model, seed, args, costs)
            except RequestError as error:
                return {"none": f"{error.came}; {error.do}"}
            except RunError as error:
                found.setdefault("failed", []).append(rate)
                print(f"{name}, seed {seed}, rate {rate}: {error}", file=sys.stderr)
                continue
            reached = tuned.read(model, seed)
            if reached["validation"] > best.get("validation", -1.0):
                full(model, seed, {**args, "max_steps": 10}, beside)
                best = {**reached, "rate": rate, "numbers": tuned.numbers, "bytes_file": tuned.size}
                best["all_steps"] = len(costs.seconds)
                middle = statistics.median(costs.seconds[3:])
                best["step_ratio"] = middle / statistics.median(beside.seconds[3:])
                best |= {"bytes_gradients": costs.gradients, "bytes_optimizer": costs.state, "bytes_saved": costs.saved}
        if not best:
            return {"none": "no rate trained"}
        best["forgetting"] = best["known"] - known(model)
        for key, value in best.items():
            found.setdefault(key, []).append(value)
    return {key: [round(v, 6) for v in values] for key, values in found.items()}


SHOWN = {
    "test": "accuracy",
    "forgetting": "loss rise on the known",
    "numbers": "numbers",
    "step_ratio": "step / full",
    "bytes_saved": "saved KiB",
    "bytes_gradients": "gradient KiB",
    "bytes_optimizer": "optimizer KiB",
    "bytes_file": "file KiB",
    "rate": "rate",
}


def lines(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table as Markdown, the best accuracy first."""
    there = {n: r for n, r in found.items() if "none" not in r}
    order = sorted(there, key=lambda n: -statistics.fmean(there[n]["test"]))
    cells = [[name, *(_cell(key, there[name][key]) for key in SHOWN)] for name in order]
    left = [f"- `{n}`: {r['none']}" for n, r in found.items() if "none" in r]
    text = table(cells, ["", *SHOWN.values()])
    if "random neurons" in there:
        text += f"\n\nWorse than random neurons at both task and keeping: {', '.join(_below(there)) or 'none'}."
    return text + ("\n\nNot here:\n\n" + "\n".join(left) if left else "")


def _below(there: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return those with a lower mean accuracy than random neurons and a larger mean loss rise."""
    mean = {n: (statistics.fmean(r["test"]), -statistics.fmean(r["forgetting"])) for n, r in there.items()}
    bar = mean["random neurons"]
    return [n for n, m in mean.items() if m[0] < bar[0] and m[1] < bar[1]]


def _cell(key: str, values: Sequence[float]) -> str:
    middle = statistics.fmean(values)
    if key in ("test", "forgetting", "step_ratio"):
        digits = 2 if key != "forgetting" else 3
        return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    if key.startswith("bytes"):
        return f"{middle / 1024:,.0f}"
    return ", ".join(f"{v:g}" for v in dict.fromkeys(values)) if key == "rate" else f"{middle:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run every contender and write table and picture."""
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=None, help="these contenders")
    parser.add_argument("--picture", type=Path, default=None)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    where, found = environment(), dict[str, dict[str, Any]]()
    settings = {"seeds": given.seeds, "steps": given.steps, "batch": BATCH, "rates": RATES, "options": OPTIONS}
    before = {"accuracy": [round(accuracy(base(s), seed=93), 4) for s in range(given.seeds)]}
    for name, tune in contenders().items():
        if given.only is not None and name not in given.only:
            continue
        if name in ELSEWHERE or (given.only is None and name in SLOW):
            found[name] = {"none": {**SLOW, **ELSEWHERE}[name]}
            continue
        start = time.perf_counter()
        found[name] = measured(name, tune, given.seeds, given.steps, RATES)
        print(f"{name:24} {time.perf_counter() - start:6.1f} s  {found[name].get('test', found[name])}", flush=True)
        if given.only is None or given.output is not None:
            ratio = {n: interval(r["step_ratio"]) for n, r in found.items() if "step_ratio" in r}
            payload = {**where, "settings": settings, "before": before, "step_ratio": ratio, "contenders": found}
            write("selective", payload, output=given.output)
    print(lines(found))
    if given.picture is not None:
        given.picture.write_text(picture(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
