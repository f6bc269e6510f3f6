"""The demo's contenders, and one training of one of them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from neurograft.core.compact.meter import saved
from neurograft.core.compact.mount import Mount
from neurograft.core.selection import Scores, Selection
from neurograft.pipeline._demo_data import Answers, Correction, answers
from neurograft.pipeline.attach import attach
from neurograft.pipeline.locate import locate
from neurograft.pipeline.select import select
from neurograft.train.loop import fit
from neurograft.worlds import atlas

LOCATED = "located neurons"
# contender: learning rates, from about the least that learns in so few steps to one that breaks things; a range
# that stops too early makes whoever it stops look worse.
RATES = {
    LOCATED: (2e-2, 4e-2, 8e-2),
    "random neurons of these layers": (2e-2, 4e-2, 8e-2),
    "random neurons anywhere": (2e-2, 4e-2, 8e-2),
    "LoRA r=3 on FFN": (2e-2, 4e-2, 8e-2),
    "LoRA r=2 on all": (2e-2, 4e-2, 8e-2),
    "full fine-tuning": (1e-3, 2e-3, 4e-3),
}


@dataclass
class Run:
    """One training and what came of it.

    Args:
        contender: who.
        rate: its learning rate.
        seed: of facts, order, selection and starts.
        answers: test -> what the model said.
        half: share of English questions right at half time.
        trained: how many numbers were trained.
        step: median seconds of a step.
        saved: bytes that a step keeps for its backward pass.
        file: bytes of the saved graft.
    """

    contender: str
    rate: float
    seed: int
    answers: dict[str, Answers] = field(default_factory=dict)
    half: float = 0.0
    trained: int = 0
    step: float = 0.0
    saved: int = 0
    file: int = 0


def rates(contender: str, count: int) -> tuple[float, ...]:
    """Return so many of a contender's learning rates, the middle one first to be kept."""
    known = RATES[contender]
    return known if count >= len(known) else known[1 : 1 + count]


def locate_for(model: nn.Module, tokenizer: Any, correction: Correction) -> Scores:
    """Score every FFN neuron by activation x gradient on the corrected facts."""
    batches = atlas.batches(correction.taught, tokenizer, size=24)
    return locate(model, batches, by="grad_x_act", units="neuron")


def mounted(model: nn.Module, contender: str, scores: Scores, *, units: int, seed: int) -> Mount:
    """Attach a contender; each but the last trains as many numbers as `units` neurons of every layer own."""
    if contender == "full fine-tuning":
        return attach(model, None, adapter="dense")
    if contender == "LoRA r=3 on FFN":
        return attach(model, None, adapter="lora", r=_rank(units, 3), targets=("mlp.*_proj",), seed=seed)
    if contender == "LoRA r=2 on all":
        return attach(model, None, adapter="lora", r=_rank(units, 2), seed=seed)
    return attach(model, chosen(contender, scores, units=units, seed=seed))


def _rank(units: int, rank: int) -> int:
    return max(1, round(rank * units / 15))


def chosen(contender: str, scores: Scores, *, units: int, seed: int) -> Selection:
    """Return the neurons of a contender."""
    located = select(scores, "top", count=units, per="layer")
    if contender == LOCATED:
        return located
    if contender == "random neurons of these layers":
        return located.random_like(seed)
    return select(scores, "random", count=len(located), per="global", seed=seed)


def train(
    model: nn.Module,
    tokenizer: Any,
    correction: Correction,
    mount: Mount,
    *,
    steps: int,
    rate: float,
    seed: int,
) -> tuple[float, float]:
    """Train a mount on the correction and replay; return English accuracy at half time and seconds a step."""
    batches = correction.steps(tokenizer, steps=steps, seed=seed)
    half, clock = [0.0], [time.perf_counter()]

    def watch(step: int) -> None:
        if step == max(1, steps // 2):
            model.eval()
            half[0] = float(answers(model, tokenizer, correction.tests["gain"]).right.mean())
            model.train()
        clock.append(time.perf_counter())

    fit(mount, batches, steps=steps, lr=rate, warmup=max(1, steps // 6), decay="linear", evaluate=watch, seed=seed)
    laps = [b - a for a, b in pairwise(clock)]
    return half[0], statistics.median(laps)


def runs_of(seed: int, contenders: Sequence[str], *, steps: int, units: int, count: int, cell: int) -> list[Run]:
    """Carry out every run of some contenders on one draw of facts; a whole job for one process.

    The first of them is the untouched base, under the name "base".
    """
    model, tokenizer = atlas.load()
    correction = Correction.draw(seed, cell=cell)
    scores = locate_for(model, tokenizer, correction)
    found = [Run("base", 0.0, seed, _asked(model, tokenizer, correction))]
    for contender in contenders:
        for rate in rates(contender, count):
            with mounted(model, contender, scores, units=units, seed=seed) as mount:
                run = Run(contender, rate, seed, trained=sum(p.numel() for p in mount.parameters()))
                with saved(model) as meter:
                    model(**correction.steps(tokenizer, steps=1, seed=seed)[0]).loss.backward()
                run.saved = meter.bytes
                for parameter in mount.parameters():
                    parameter.grad = None
                run.half, run.step = train(model, tokenizer, correction, mount, steps=steps, rate=rate, seed=seed)
                model.eval()
                run.answers = _asked(model, tokenizer, correction)
                graft = mount.graft()
            if rate == rates(contender, count)[0]:
                run.file = _file_size(graft)
            found.append(run)
    return found


def _asked(model: nn.Module, tokenizer: Any, correction: Correction) -> dict[str, Answers]:
    return {name: answers(model, tokenizer, rows) for name, rows in correction.tests.items()}


def _file_size(graft: Any) -> int:
    with tempfile.TemporaryDirectory(prefix="neurograft-") as folder:
        written = graft.save(Path(folder) / "graft")
        return sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
