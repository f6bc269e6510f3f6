"""The sweep and the table of selective tuning, in any world."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, environment, interval, table, write
from _costs import Costs
from _pareto import picture
from _rivals import Contender, World, ours

from neurograft.core.errors import RequestError, RunError

RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def measured(name: str, tune: Contender, world: World, seeds: int, steps: int) -> dict[str, Any]:
    """Return a contender's numbers, one for each seed, at the rate that validation chose; or why it has none."""
    full, found = ours(), dict[str, list[float]]()
    for seed in range(seeds):
        best = dict[str, float]()
        for rate in RATES:
            args = {
                "learning_rate": rate,
                "max_steps": steps,
                "per_device_train_batch_size": world.batch,
                "warmup_steps": 10,
                "lr_scheduler_type": "linear",
            }
            costs, beside = Costs(), Costs()
            try:
                tuned = tune(world, seed, args, costs)
            except RequestError as error:
                return {"none": f"{error.came}; {error.do}"}
            except RunError as error:
                found.setdefault("failed", []).append(rate)
                print(f"{name}, seed {seed}, rate {rate}: {error}", file=sys.stderr)
                continue
            reached = tuned.read(world, seed)
            if reached["validation"] > best.get("validation", -1.0):
                full(world, seed, {**args, "max_steps": 10}, beside)
                best = {**reached, "rate": rate, "numbers": tuned.numbers, "bytes_file": tuned.size}
                best["all_steps"] = costs.before + len(costs.seconds)
                middle = statistics.median(costs.seconds[3:])
                best["step_ratio"] = middle / statistics.median(beside.seconds[3:])
                best |= {"bytes_gradients": costs.gradients, "bytes_optimizer": costs.state, "bytes_saved": costs.saved}
        if not best:
            return {"none": "no rate trained"}
        best["forgetting"] = best["known"] - world.read(world.base(seed), seed)["known"]
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


def lines(found: Mapping[str, Mapping[str, Any]], shown: Mapping[str, str] = SHOWN) -> str:
    """Return the table as Markdown, the best accuracy first."""
    there = {n: r for n, r in found.items() if "none" not in r}
    order = sorted(there, key=lambda n: -statistics.fmean(there[n]["test"]))
    cells = [[name, *(_cell(key, there[name][key]) for key in shown)] for name in order]
    left = [f"- `{n}`: {r['none']}" for n, r in found.items() if "none" in r]
    text = table(cells, ["", *shown.values()])
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
    if key in ("test", "head", "forgetting", "step_ratio"):
        digits = 2 if key != "forgetting" else 3
        return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    if key.startswith("bytes"):
        return f"{middle / 1024:,.0f}"
    return ", ".join(f"{v:g}" for v in dict.fromkeys(values)) if key == "rate" else f"{middle:,.0f}"


def board(
    name: str, about: str, world: World, rivals: Mapping[str, Contender], shown: Mapping[str, str], argv: Any
) -> int:
    """Run every contender and write results, table and picture."""
    parser = arguments(about, threads=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=None, help="these contenders")
    parser.add_argument("--picture", type=Path, default=None)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    where, found = environment(), dict[str, dict[str, Any]]()
    settings = {"seeds": given.seeds, "steps": given.steps, "batch": world.batch, "rates": RATES}
    settings["options"] = world.options
    reached = [world.read(world.base(seed), seed) for seed in range(given.seeds)]
    gc.freeze()  # every Trainer collects garbage, and would walk through all that was imported
    before = {{"test": "accuracy"}.get(key, key): [round(r[key], 4) for r in reached] for key in reached[0]}
    for rival, tune in rivals.items():
        if given.only is not None and rival not in given.only:
            continue
        if given.only is None and rival in world.absent:
            found[rival] = {"none": world.absent[rival]}
            continue
        start = time.perf_counter()
        found[rival] = measured(rival, tune, world, given.seeds, given.steps)
        print(f"{rival:24} {time.perf_counter() - start:6.1f} s  {found[rival].get('test', found[rival])}", flush=True)
        if given.only is None or given.output is not None:
            ratio = {n: interval(r["step_ratio"]) for n, r in found.items() if "step_ratio" in r}
            payload = {**where, "settings": settings, "before": before, "step_ratio": ratio, "contenders": found}
            write(name, payload, output=given.output)
    print(lines(found, shown))
    if given.picture is not None:
        given.picture.write_text(picture(found), encoding="utf-8")
    return 0
