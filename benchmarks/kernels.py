"""Products of float32 matrices: torch's own against oneDNN's, over sizes and ways of lying.

    python benchmarks/kernels.py [--rounds 15] [--threads 2]

`neurograft.core.numerics.matmul` takes oneDNN from WORTH multiplications on, where the processor has 512-bit vectors.
The shapes are those of compact training: the gradient of an input, thin products of chosen rows or columns, and small
ones around the threshold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from _bench import arguments, environment, interleave, table, write
from torch import Tensor

from neurograft.core.numerics import matmul as module
from neurograft.core.seeds import generator

OURS, TORCH = "chosen", "torch.mm"
SHAPES = {
    "an input's gradient, 1536 to 512": ("rows", 1024, 1536, 512),
    "an input's gradient, 512 to 1536": ("rows", 1024, 512, 1536),
    "31 chosen rows": ("columns", 31, 1024, 512),
    "31 chosen columns": ("columns", 512, 1024, 31),
    "2 rows": ("rows", 2, 1024, 1024),
    "32 rows": ("rows", 32, 1024, 1024),
    "96 cubed": ("rows", 96, 96, 96),
    "128 cubed": ("rows", 128, 128, 128),
    "160 cubed": ("rows", 160, 160, 160),
}
REPEATED = 1 << 28  # multiplications in one timed call, at least


def contender(lies: str, rows: int, inner: int, columns: int, product: Callable[[Tensor, Tensor], Tensor]):
    """Return a product to time, often enough to be seen."""
    rng = generator(0, "kernels")
    a = torch.randn(inner, rows, generator=rng).t() if lies == "columns" else torch.randn(rows, inner, generator=rng)
    b, times = torch.randn(inner, columns, generator=rng), max(1, REPEATED // (rows * inner * columns))

    def run() -> None:
        with torch.no_grad():
            for _ in range(times):
                product(a, b)

    return run


def main(words: list[str] | None = None) -> int:
    """Run the benchmark."""
    given = arguments(__doc__.splitlines()[0]).parse_args(words)
    torch.set_num_threads(given.threads)
    where = environment()
    made = {(n, OURS): contender(*shape, module.matmul) for n, shape in SHAPES.items()}
    made |= {(n, TORCH): contender(*shape, torch.mm) for n, shape in SHAPES.items()}
    times = interleave(
        {" / ".join(k): run for k, run in made.items()}, rounds=given.rounds, warmups=given.warmups, seed=given.seed
    )
    shares = {n: times.ratio(f"{n} / {OURS}", f"{n} / {TORCH}") for n in SHAPES}
    rows = [[n, f"{s['median']:.2f}", f"{s['low']:.2f} to {s['high']:.2f}"] for n, s in shares.items()]
    print(table(rows, ["product", "share of torch.mm", "95 % interval"]))
    payload = {
        "benchmark": "kernels", "environment": where, "capability": torch.backends.cpu.get_cpu_capability(),
        "worth": module.WORTH, "shapes": SHAPES, "rounds": given.rounds, "share_of_torch": shares, **times.summary(),
    }  # fmt: skip
    print(write("kernels", payload, output=given.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
