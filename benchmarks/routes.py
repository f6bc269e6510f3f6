"""How long every route to a compact gradient takes, as a share of the dense gradient of the same weight.

    python benchmarks/routes.py [--rounds 7] [--threads 1] [--clock cpu]

The thresholds in `neurograft.core.compact.gradients` (LOOP, DENSE, BLOCKS) are read off these numbers: each forced
route is measured on both sides of its threshold. Timings are on one [1536, 512] weight and 1,024 tokens, float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from _bench import arguments, environment, interleave, table, write
from torch import Tensor

from neurograft.core.compact import gradients
from neurograft.core.compact.gradients import route
from neurograft.core.region import Region
from neurograft.core.seeds import generator

ROWS, COLUMNS, TOKENS = 1536, 512, 1024
FRACTIONS = (0.001, 0.01, 0.02, 0.05, 0.2, 0.5)
DENSE = "dense"


def regions() -> dict[str, tuple[Region, dict[str, float]]]:
    """Return what is measured: name -> (entries, thresholds that force the route)."""
    rng, shape, found = generator(0, "routes"), (ROWS, COLUMNS), {}

    def some(total: int, share: float) -> Tensor:
        return torch.randperm(total, generator=rng)[: max(1, round(total * share))]

    for share in FRACTIONS:
        label = f"{100 * share:g} %"
        found[f"rows {label}"] = (Region.of(shape, "rows", some(ROWS, share)), {})
        found[f"columns {label}"] = (Region.of(shape, "cols", some(COLUMNS, share)), {})
        blocks = Region.of(shape, "block", some(48 * 16, share), block=(32, 32))
        found[f"blocks 32x32, gathered {label}"] = (blocks, {"BLOCKS": 2.0})
        found[f"blocks 32x32, dense chunks {label}"] = (blocks, {"BLOCKS": -1.0})
        entries = Region.of(shape, "flat", some(ROWS * COLUMNS, share))
        found[f"entries, sampled product {label}"] = (entries, {"DENSE": 2.0})
        found[f"entries, dense chunks {label}"] = (entries, {"DENSE": -1.0})
    for k in (1, 2, 3, 4, 8):
        column = torch.rand(ROWS, COLUMNS, generator=rng).argsort(1)[:, :k].sort(1).values
        entries = Region.of(shape, "flat", (torch.arange(ROWS)[:, None] * COLUMNS + column).reshape(-1))
        found[f"{k} per row, loop"] = (entries, {"LOOP": COLUMNS, "DENSE": 2.0})
        found[f"{k} per row, sampled product"] = (entries, {"LOOP": 0, "DENSE": 2.0})
    return found


def contenders() -> dict[str, Callable[[], object]]:
    """Return the gradients to time; the input is gathered as the forward pass keeps it."""
    rng = generator(1, "routes")
    x, g = torch.randn(TOKENS, COLUMNS, generator=rng), torch.randn(TOKENS, ROWS, generator=rng)
    made: dict[str, Callable[[], object]] = {DENSE: lambda: g.t() @ x}
    for name, (region, forced) in regions().items():
        with patch.dict(vars(gradients), forced):
            chosen = route(region, "column", torch.device("cpu"))
        kept = x if chosen.keep is None else x.index_select(1, chosen.keep)
        made[name] = lambda chosen=chosen, kept=kept: chosen.gradient(kept, g)
    return made


def main(words: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], rounds=7, threads=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    where, made = environment(), contenders()
    times = interleave(made, rounds=given.rounds, warmups=given.warmups, seed=given.seed)
    shares = {n: times.ratio(n, DENSE, clock=given.clock) for n in made if n != DENSE}
    print(f"dense: {1e3 * times.median(DENSE, clock=given.clock):.1f} ms")
    print(table([[n, f"{s['median']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}"] for n, s in shares.items()],
                ["route", "share of the dense gradient", "95 % interval"]))  # fmt: skip
    payload = {
        "benchmark": "routes", "environment": where, "clock": given.clock, "rounds": given.rounds,
        "weight": [ROWS, COLUMNS], "tokens": TOKENS,
        "thresholds": {n: getattr(gradients, n) for n in ("LOOP", "DENSE", "BLOCKS")},
        "share_of_dense": shares, **times.summary(),
    }  # fmt: skip
    print(write("routes", payload, output=given.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
