"""A leaderboard of truth: every locator on worlds whose carriers are known by construction.

    python benchmarks/planted.py [--seeds 3] [--only NAME ...] [--output FILE]

Four worlds, built anew for each seed: neurons that alone carry trigger -> answer beside decoys that fire alike and do
nothing, in a tiny Llama and in the experts of a tiny Mixtral; neurons, and single weights, in which a teacher differs
from its student. Each locator sees what its card asks for: labelled batches (the answer, or the teacher's
predictions), a contrast set (rows without the trigger, or other inputs), the changed model where it compares two.
`noise` and `magnitude` are the floors. `spared` and `shutting` put first what can go, so carriers come last: an AUROC
of 0 is what they should have there.

Numbers: precision at k (k the number of planted units), recall at 2k, AUROC, the worst and best over seeds; passes
forward and backward over the data; the most bytes of tensors alive beyond those before.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from _bench import arguments, environment, table, write
from torch import Tensor, nn

from neurograft.anatomy.sites import sites
from neurograft.core.choose import Chosen, choose, methods
from neurograft.core.compact.meter import Peak
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.selection import Selection
from neurograft.worlds.pico import pico_batch
from neurograft.worlds.planted import planted
from neurograft.worlds.planted_delta import planted_delta
from neurograft.worlds.tiny import llama
from neurograft.worlds.truth import Truth

SIZE = {"intermediate_size": 128, "num_hidden_layers": 4}
# So weakly that the planted neurons' weights are no larger than those of others.
STRENGTH = 0.975
# Locators that ask another one: what they are asked with here.
ASKING: Mapping[str, Mapping[str, Any]] = {
    "product": {"of": ["magnitude", "activation"]},
    "within": {"by": "grad_x_act", "roles": ["ffn"]},
    "rehearsed": {"by": "grad_x_act", "steps": 10},
}


@dataclass
class World:
    """What a locator is given, and what it should find."""

    context: Context
    truth: Truth


def carriers(family: str) -> Callable[[int], World]:
    """Return the maker of a world in which planted neurons alone carry trigger -> answer."""

    def make(seed: int) -> World:
        world = planted(family, per_layer=3, decoys=6, strength=STRENGTH, seed=seed, **SIZE)
        if world.answers() < 1.0 or world.answers(triggered=False) > 0.1:
            raise RuntimeError(f"the planted behaviour of {family}, seed {seed}, does not show")
        without = deepcopy(world.model)  # what a locator that compares two models is given
        with torch.no_grad():
            for name, flat in world.truth.entries.items():
                without.get_parameter(name).view(-1)[flat] = 0.0
        context = Context(
            world.model,
            sites(world.model, "neuron"),
            world.batches(8, seed=seed),
            world.batches(8, triggered=False, seed=seed),
            loss=lambda model, batch: model(**batch).loss,
            against=without,
            seed=seed,
        )
        return World(context, world.truth)

    return make


def moved(kind: str, count: int, match: str | None = None) -> Callable[[int], World]:
    """Return the maker of a world in which a teacher differs from its student in `count` units of a kind."""

    def make(seed: int) -> World:
        model = llama(seed, **SIZE)
        found = sites(model, kind, match=match)
        drawn = choose("locators", "noise")(Context(model, found, seed=seed + 100))
        where: Selection = drawn.top(count=count)
        world = planted_delta(model, where, scale=2.0, count=8, seed=seed)
        labelled = [{**b, "labels": b["input_ids"]} for b in world.train]  # counts as labels; the loss is the teacher's
        context = Context(
            model,
            found,
            labelled,
            [pico_batch(model, batch=16, seed=900 + i) for i in range(8)],
            loss=lambda model, batch: world.loss(model, {k: v for k, v in batch.items() if k != "labels"}),
            against=world.teacher,
            seed=seed,
        )
        return World(context, world.truth)

    return make


WORLDS: Mapping[str, Callable[[int], World]] = {
    "neurons of a Llama": carriers("llama"),
    "neurons of a Mixtral's experts": carriers("mixtral"),
    "neurons a teacher moved": moved("neuron", 12),
    "weights a teacher moved": moved("weight", 64, "*down_proj*"),
}


@contextmanager
def passes(model: nn.Module, rows: int) -> Iterator[dict[str, float]]:
    """Count forward and backward passes over `rows` examples."""
    found = {"forward": 0.0, "backward": 0.0}

    def ran(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        share = len(kwargs.get("input_ids", args[0] if args else ())) / rows
        found["forward"] += share
        logits: Tensor = output.logits
        if logits.requires_grad:
            logits.register_hook(lambda gradient: found.update(backward=found["backward"] + share))

    handle = model.register_forward_hook(ran, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def measured(locator: Chosen, world: World) -> dict[str, Any]:
    """Return one locator's numbers in one world, or why it has none."""
    context = world.context
    card = locator.card
    if card.kinds and not {s.kind for s in context.sites.values()} <= card.kinds:
        return {"none": f"scores {', '.join(sorted(card.kinds))}"}
    if "taps" in card.needs and any(s.tap is None for s in context.sites.values()):
        return {"none": "needs units with activations"}
    rows = sum(len(b["input_ids"]) for b in context.batches)
    try:
        with passes(context.model, rows) as cost:
            scores = locator(context)
        few = replace(context, batches=context.batches[:1], contrast=context.contrast[:1])
        with Peak() as memory:  # watching every operation is slow
            locator(few)
    except RequestError as error:
        return {"none": f"refuses: {error.came}"}
    ranked = world.truth.ranked(scores)
    k = len(world.truth.selection(scores.sites))
    twice = scores.top(count=min(2 * k, sum(s.n for s in scores.sites.values())))
    return {**ranked, "recall_at_2k": world.truth.found(twice)["recall"], **cost, "bytes": memory.peak}


def board(names: Sequence[str], seeds: int) -> dict[str, dict[str, Any]]:
    """Return world -> locator -> its numbers over the seeds."""
    found: dict[str, dict[str, Any]] = {}
    for title, make in WORLDS.items():
        worlds = [make(seed) for seed in range(seeds)]
        found[title] = {}
        for name in names:
            locator = choose("locators", name, **ASKING.get(name, {}))
            each = [measured(locator, world) for world in worlds]
            odd = next((e["none"] for e in each if "none" in e), None)
            found[title][name] = {"none": odd} if odd else summary(each)
    return found


def summary(each: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return mean, lowest and highest over seeds of how well, and the mean of what it cost."""
    made: dict[str, Any] = {}
    for key in ("precision_at_k", "recall_at_2k", "auroc"):
        values = [e[key] for e in each]
        made[key] = {"mean": round(statistics.fmean(values), 4), "low": round(min(values), 4)}
        made[key]["high"] = round(max(values), 4)
    made |= {key: round(statistics.fmean(e[key] for e in each), 2) for key in ("forward", "backward")}
    return {**made, "bytes": int(statistics.fmean(e["bytes"] for e in each))}


def lines(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the board as Markdown, the best first in each world."""
    text = ""
    for title, by in found.items():
        rows = sorted(((n, r) for n, r in by.items() if "none" not in r), key=lambda row: -row[1]["auroc"]["mean"])
        cells = []
        for name, row in rows:
            well = [_range(row[key]) for key in ("precision_at_k", "recall_at_2k", "auroc")]
            cells.append([name, *well, row["forward"], row["backward"], f"{row['bytes'] / 2**20:.2f}"])
        head = ["locator", "precision at k", "recall at 2k", "AUROC", "forward", "backward", "MiB"]
        text += f"\n### {title[0].upper()}{title[1:]}\n\n{table(cells, head)}\n"
        left = [f"`{n}` {r['none']}" for n, r in by.items() if "none" in r]
        text += f"\nNot here: {'; '.join(left)}.\n" if left else ""
    return text


def _range(value: Mapping[str, float]) -> str:
    shown = f"{value['mean']:.2f}"
    return shown if value["low"] == value["high"] else f"{shown} ({value['low']:.2f} to {value['high']:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the board and write it."""
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=None, help="these locators")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    where = environment()
    found = board(given.only or methods("locators"), given.seeds)
    print(lines(found))
    if given.only is None or given.output is not None:
        print(write("planted", {**where, "seeds": given.seeds, "worlds": found}, output=given.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
