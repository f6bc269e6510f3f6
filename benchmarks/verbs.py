"""What every verb costs beside a floor: a pass, a hash, a copy, a file read or written; and what starting costs.

    python benchmarks/verbs.py [--rounds 3] [--threads 2] [--clock wall|cpu] [--only locate tune] [--skip memory]

A Llama of 94 M numbers in float32 and a Mixtral of 97 M in bfloat16, random weights, neurons at 2 %, little data: what
verbs do besides passes shows. Peak memory is that of one process per verb, forked from one that holds the model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import ROOT, Times, arguments, environment, interleave, table, target, write
from _verbs import MODELS, Bench, Case, banks, floors, verbs
from transformers.utils import logging

COMMANDS: dict[str, tuple[str, str]] = {  # what is typed -> its floor and the words
    "neurograft --help": ("python", "--help"),
    "neurograft locate --help": ("python", "locate --help"),
    "neurograft run s2ft --help": ("python", "run s2ft --help"),
    "neurograft papers": ("python", "papers"),
    "neurograft plan tiny s2ft": ("import LlamaForCausalLM", "plan {model} s2ft"),
    "neurograft anatomy tiny": ("import LlamaForCausalLM", "anatomy {model}"),
}
IMPORTS: dict[str, tuple[str | None, str]] = {
    "python": (None, "pass"),
    "import torch": (None, "import torch"),
    "import LlamaForCausalLM": (None, "from transformers import LlamaForCausalLM"),
    "import neurograft": ("python", "import neurograft"),
    "neurograft.locate": ("import torch", "import neurograft; neurograft.locate"),
    "neurograft.tune": ("import torch", "import neurograft; neurograft.tune"),
    "neurograft.audit": ("import torch", "import neurograft; neurograft.audit"),
}
PARTS = ("llama", "mixtral", "start", "memory")


def cases(kind: str, folder: Path, seed: int) -> list[Case]:
    """Return the floors and verbs of a model."""
    bench = Bench(kind, folder, seed)
    return [*floors(bench), *(verbs(bench) if kind == "llama" else banks(bench))]


def wanted(found: Sequence[Case], only: Iterable[str]) -> list[Case]:
    """Return the verbs whose names hold one of some words, with their floors."""
    words = list(only)
    verbs = [c for c in found if c.floor and (not words or any(w in c.name for w in words))]
    needed = {c.floor for c in verbs}
    return [c for c in found if c.name in needed] + verbs


def judged(found: Sequence[Case], times: Times, clock: str) -> dict[str, Any]:
    """Return every verb's ratio to its floor, beside its target where it has one."""
    made: dict[str, Any] = {}
    for case in found:
        if case.floor is None:
            continue
        ratio = {k: round(v / case.times, 4) for k, v in times.ratio(case.name, case.floor, clock=clock).items()}
        said = {"floor": f"{case.times} x {case.floor}" if case.times > 1 else case.floor, **ratio}
        made[case.name] = said | (target(ratio["median"], case.at_most) if case.at_most else {})
    return made


def starting(folder: Path) -> list[Case]:
    """Return commands and imports, each a process of its own."""
    from neurograft.worlds.pico import pico

    pico("llama").save_pretrained(folder / "tiny")
    typed = "import sys; from neurograft.cli import main; sys.argv = ['neurograft', *sys.argv[1:]]; main()"

    def process(code: str, *words: str) -> Callable[[], None]:
        line = [sys.executable, "-c", code, *words]
        path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
        return lambda: subprocess.run(line, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path})

    found = [Case(name, process(code), floor) for name, (floor, code) in IMPORTS.items()]
    for name, (floor, words) in COMMANDS.items():
        found.append(Case(name, process(typed, *words.format(model=folder / "tiny").split()), floor))
    return found


def peaks(kind: str, folder: Path, seed: int, only: Iterable[str]) -> dict[str, int]:
    """Return by how many bytes each verb raises the peak of a process that holds the model and has run it before."""
    found = {}
    for case in wanted(cases(kind, folder, seed), only):
        read, send = os.pipe()
        child = os.fork()
        if child == 0:
            _measured(case.run, send)
        os.close(send)
        with os.fdopen(read) as said:
            found[case.name] = int(said.read() or -1)
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError(f"{case.name} failed in its own process")
    return found


def _measured(run: Callable[[], object], send: int) -> None:
    """Run twice, write by how much the second time raised the peak, and end this process."""
    status = 1
    try:
        run()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held
        before = _held("VmRSS")
        run()
        os.write(send, str(_held("VmHWM") - before).encode())
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)  # whatever this process was about to tidy up belongs to the one it was forked from


def _held(what: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(what))
    return int(line.split()[1]) * 1024


def _apart(kind: str, seed: int, only: Iterable[str]) -> dict[str, int]:
    """Return `peaks` from a fresh process of one thread, which alone may fork."""
    line = [sys.executable, __file__, "--peaks", kind, "--seed", str(seed), "--threads", "1", "--only", *only]
    said = subprocess.run(line, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, int] = json.loads(said.stdout.splitlines()[-1])
    return found


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; exit status 1 if a target was missed."""
    parser = arguments(__doc__.splitlines()[0], rounds=3)
    parser.set_defaults(warmups=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu for a busy machine")
    parser.add_argument("--only", nargs="*", default=[], help="verbs whose names hold one of these words")
    parser.add_argument("--skip", nargs="*", choices=PARTS, default=[], help="parts to leave out")
    parser.add_argument("--peaks", choices=list(MODELS), help="print the peaks of one model alone, as JSON")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where, parts = environment(), [p for p in PARTS if p not in given.skip]
    payload: dict[str, Any] = {"benchmark": "verbs", "environment": where, "rounds": given.rounds, "clock": given.clock}
    with tempfile.TemporaryDirectory(prefix="neurograft-verbs-") as scratch:
        if given.peaks:
            print(json.dumps(peaks(given.peaks, Path(scratch), given.seed, given.only)))
            return 0
        for part in (p for p in parts if p != "memory"):
            folder = Path(scratch) / part
            folder.mkdir()
            found = wanted(starting(folder) if part == "start" else cases(part, folder, given.seed), given.only)
            warmups = 0 if part == "start" else given.warmups
            times = interleave({c.name: c.run for c in found}, rounds=given.rounds, warmups=warmups, seed=given.seed)
            high = _apart(part, given.seed, given.only) if "memory" in parts and part != "start" else {}
            payload[part] = {
                "verbs": judged(found, times, given.clock),
                "peak_mib": {n: round(held / 2**20, 1) for n, held in high.items()},
                **times.summary(),
            }
            print(f"\n{part}\n{_shown(found, times, payload[part], given.clock)}")
    print(write("verbs", payload, output=given.output))
    return 0 if all(v.get("reached", True) for p in parts if p in payload for v in payload[p]["verbs"].values()) else 1


def _shown(found: Sequence[Case], times: Times, part: dict[str, Any], clock: str) -> str:
    lines = []
    for case in found:
        said = {"median": "", "floor": "", **part["verbs"].get(case.name, {})}
        mark = "" if "reached" not in said else "ok" if said["reached"] else f"MISS (at most {said['at_most']})"
        seconds = f"{statistics.median(times.seconds[clock][case.name]):.3f}"
        peak = part["peak_mib"].get(case.name, "")
        lines.append([case.name, seconds, peak, said["median"], said["floor"], mark])
    return table(lines, ["verb", f"{clock} s", "peak MiB", "ratio", "to", "target"])


if __name__ == "__main__":
    sys.exit(main())
