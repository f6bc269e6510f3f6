"""What benchmarks share: contenders taken in turn, medians, paired ratios with intervals, results with their origin.

A machine's speed drifts, so contenders run in one process, in a new random order every round, and are compared
round by round: the ratio of two contenders is the median of their ratios within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
Clock = str  # "wall": seconds passed; "cpu": seconds of all threads and ended children, for busy machines


@dataclass
class Times:
    """Seconds by clock, contender and round.

    Args:
        seconds: clock -> contender -> one number a round; the rounds of all contenders correspond.
    """

    seconds: dict[Clock, dict[str, list[float]]] = field(default_factory=lambda: {"wall": {}, "cpu": {}})

    def median(self, name: str, *, clock: Clock = "wall") -> float:
        """Return the median seconds of a contender."""
        return statistics.median(self.seconds[clock][name])

    def ratio(self, name: str, other: str, *, clock: Clock = "wall") -> dict[str, float]:
        """Return the paired ratio name / other: median over rounds, with a 95 % bootstrap interval."""
        mine, theirs = self.seconds[clock][name], self.seconds[clock][other]
        return interval([a / b for a, b in zip(mine, theirs)])

    def summary(self) -> dict[str, Any]:
        """Return plain data: medians and all rounds, by clock."""
        medians = {c: {n: round(statistics.median(s), 6) for n, s in by.items()} for c, by in self.seconds.items()}
        rounds = {c: {n: [round(x, 6) for x in s] for n, s in by.items()} for c, by in self.seconds.items()}
        return {"median_seconds": medians, "seconds": rounds}


def interval(values: Sequence[float], *, seed: int = 0, draws: int = 4000) -> dict[str, float]:
    """Return the median of paired values and a 95 % percentile bootstrap interval of that median.

    Example:
        >>> interval([1.0, 1.0, 1.0])
        {'median': 1.0, 'low': 1.0, 'high': 1.0}
    """
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    low, high = medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]
    return {"median": round(statistics.median(values), 4), "low": round(low, 4), "high": round(high, 4)}


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmups: int = 3, seed: int = 0
) -> Times:
    """Run every contender once a round, in a random order, and time it.

    Args:
        contenders: name -> what to time.
        rounds: timed rounds.
        warmups: rounds before them that are not counted.
        seed: of the orders.
    """
    rng, times = random.Random(seed), Times()
    for clock in times.seconds.values():
        clock.update({name: [] for name in contenders})
    for turn in range(warmups + rounds):
        for name in rng.sample(list(contenders), len(contenders)):
            gc.collect()
            gc.disable()
            try:
                wall, cpu = time.perf_counter(), _busy()
                contenders[name]()
                wall, cpu = time.perf_counter() - wall, _busy() - cpu
            finally:
                gc.enable()
            if turn >= warmups:
                times.seconds["wall"][name].append(wall)
                times.seconds["cpu"][name].append(cpu)
    return times


def arguments(description: str, *, rounds: int = 15, threads: int = 2) -> argparse.ArgumentParser:
    """Return a parser with the options every benchmark has, and set nothing yet."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmups", type=int, default=3, help="rounds before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=threads, help="torch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="where to write the JSON")
    return parser


def environment() -> dict[str, Any]:
    """Return what the numbers were measured on: commit, machine, versions, threads."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "load_before": round(os.getloadavg()[0], 2),
        },
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "peft")}},
    }


def target(value: float, at_most: float) -> dict[str, Any]:
    """Return a measured number beside its target.

    Example:
        >>> target(0.97, 1.03)
        {'value': 0.97, 'at_most': 1.03, 'reached': True}
    """
    return {"value": round(value, 4), "at_most": at_most, "reached": value <= at_most}


def write(name: str, payload: Mapping[str, Any], *, output: Path | None = None) -> Path:
    """Write results as JSON, to `benchmarks/results/<name>.json` unless told otherwise; return the path."""
    path = output or ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=1) + "\n")
    return path


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """Return a Markdown table.

    Example:
        >>> print(table([["a", 1]], ["name", "n"]))
        | name | n |
        |---|---|
        | a | 1 |
    """
    lines = [head, *rows]
    made = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join([made[0], "|" + "---|" * len(head), *made[1:]])


def _busy() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _git(*words: str) -> str:
    found = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
