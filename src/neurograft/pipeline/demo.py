"""demo: correct facts in one language, ask in the others, and say honestly who did it best."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import digest
from neurograft.core.progress import Progress, quiet
from neurograft.pipeline import _demo_numbers as numbers
from neurograft.pipeline._demo_data import Correction
from neurograft.pipeline._demo_page import page
from neurograft.pipeline._demo_runs import LOCATED, RATES, Run, locate_for, mounted, runs_of, train
from neurograft.pipeline._demo_text import lines
from neurograft.pipeline._versions import versions_here
from neurograft.pipeline.audit import audit
from neurograft.pipeline.state import as_found
from neurograft.worlds import atlas

# Contenders that share a job; the two halves take about equally long.
HALVES = (tuple(RATES)[:3], tuple(RATES)[3:])


def demo(
    *,
    output: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 32,
    units: int = 15,
    rates: int = 3,
    cell: int = 4,
    processes: int = 2,
    report: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Correct moved capitals in the shipped atlas, in English, and compare who carries them into other languages.

    Located neurons (activation x gradient, as many in every layer), random neurons of the same layers, random
    neurons anywhere, PEFT LoRA of the same size on the FFN and on all linear layers, and full fine-tuning, each at
    several learning rates on the same facts in the same order. Then the located change is applied, undone and
    audited.

    Args:
        output: folder for `demo.json`, `demo.html`, the graft and its report; `neurograft-demo` if None.
        seeds: draws of facts, order, random neurons and LoRA's starts.
        steps: training steps, of 24 new and 12 old questions.
        units: neurons in each layer; LoRA's ranks follow (3 and 2 at 15).
        rates: learning rates of each contender, at most 3.
        cell: old questions for each skill and language.
        processes: jobs at a time, of one thread each; 1 runs them here.
        report: audit the graft as well.
        progress: (items, what) -> items, to show a bar.

    Returns:
        Plain data: `sentence`, `lines`, `far`, `careful`, `runs`, `forgetting`, `undo`, paths.

    Raises:
        RequestError: no seeds, or the output is a file.
    """
    started = time.perf_counter()
    target = Path(output or "neurograft-demo")
    if not seeds or rates < 1:
        raise RequestError(f"{len(seeds)} seeds and rates={rates}", expected="at least one", do="seeds=0,1,2")
    if target.exists() and not target.is_dir():
        raise RequestError(f"the path {target}, a file", expected="a folder", do="choose another path")
    options = {"steps": steps, "units": units, "count": rates, "cell": cell}
    runs = _runs(seeds, options, processes, progress)
    corrections = {seed: Correction.draw(seed, cell=cell) for seed in seeds}
    data = {"seeds": list(seeds), "steps": steps, "facts": len(corrections[seeds[0]].changes), **_versions()}
    data |= numbers.summary(runs, corrections)
    _add_files(data, runs)
    data["processes"] = processes
    target.mkdir(parents=True, exist_ok=True)
    rate = data["rates"]["far"][LOCATED]
    data |= _shown(target, corrections[seeds[0]], seed=seeds[0], steps=steps, units=units, rate=rate, report=report)
    data["page"] = str(target / "demo.html")
    data["seconds"] = round(time.perf_counter() - started, 1)
    data["lines"] = lines(data)
    (target / "demo.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (target / "demo.html").write_text(page(data), encoding="utf-8")
    return data


def _runs(
    seeds: Sequence[int],
    options: Mapping[str, Any],
    processes: int,
    progress: Progress | None,
) -> list[Run]:
    jobs = [(seed, half) for seed in seeds for half in HALVES]
    watch = progress or quiet
    made: dict[tuple[int, tuple[str, ...]], list[Run]] = {}
    if processes <= 1:
        for job in watch(jobs, "trainings"):
            made[job] = _job(job[0], job[1], options)
    else:
        # A forked child of a process that has used threads may hang; a spawned one starts clean.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_quiet) as pool:
            futures = {pool.submit(_job, job[0], job[1], options): job for job in jobs}
            for future in watch(as_completed(futures), "trainings"):
                made[futures[future]] = future.result()
    ordered = [run for job in jobs for run in made[job]]
    first = {job[0]: made[job][0] for job in reversed(jobs)}  # both halves measured the same base
    return [*first.values(), *(run for run in ordered if run.contender != "base")]


def _job(seed: int, contenders: Sequence[str], options: Mapping[str, Any]) -> list[Run]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return runs_of(seed, contenders, **options)
    finally:
        torch.set_num_threads(threads)


def _quiet() -> None:
    """Keep a worker's own progress bars off the screen."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _add_files(data: dict[str, Any], runs: Sequence[Run]) -> None:
    for rule in ("far", "careful"):
        for contender, row in data[rule]["contenders"].items():
            row["file_bytes"] = max(r.file for r in runs if r.contender == contender)


def _shown(
    target: Path, correction: Correction, *, seed: int, steps: int, units: int, rate: float, report: bool
) -> dict[str, Any]:
    """Train the located neurons once more, save the graft, apply and undo it, and audit it."""
    model, tokenizer = atlas.load()
    before = digest(dict(model.state_dict()))
    scores = locate_for(model, tokenizer, correction)
    with as_found(model), mounted(model, LOCATED, scores, units=units, seed=seed) as mount:
        train(model, tokenizer, correction, mount, steps=steps, rate=rate, seed=seed)
        graft = mount.graft(card={"recipe": "demo", "seed": seed, "steps": steps, "learning_rate": rate})
    row = correction.tests["gain"][0]
    said = [_answer(model, tokenizer, row["prompt"])]
    graft.apply(model)
    said.append(_answer(model, tokenizer, row["prompt"]))
    graft.remove(model)
    said.append(_answer(model, tokenizer, row["prompt"]))
    after = digest(dict(model.state_dict()))
    folder = graft.save(target / "graft")
    size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    found: dict[str, Any] = {
        "graft": {"path": str(target / "graft"), "bytes": size, "numbers": graft.numel},
        "undo": {
            "question": row["prompt"],
            **dict(zip(("before", "during", "after"), said)),
            "digest": after,
            "identical": before == after,
        },
    }
    if report:
        old = correction.tests["old"]
        keep = {"other capitals": correction.tests["capitals"], "old skills": old}
        kept = {name: atlas.batches(rows, tokenizer, size=48) for name, rows in keep.items()}
        done = audit(
            model, graft, gain=atlas.batches(correction.tests["gain"], tokenizer, size=48), keep=kept, seed=seed
        )
        found["report"] = {"verdict": done.sentence, "path": str(done.save(target / "report"))}
    return found


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _versions() -> dict[str, Any]:
    return {"versions": versions_here(), "base": atlas.accuracies()["build"]["digest"]}
