"""What looking costs: statistics of every FFN neuron against the plain forward pass, attribution against backward.

    python benchmarks/stream.py [--rounds 15] [--threads 2] [--clock wall|cpu] [--batches 2]

A Llama-type model, hidden 512, FFN 1536, 8 layers, batches of 1,024 tokens, float32. Every round starts with empty
reducers, so the first batches, in which every exemplar is new, are always among those measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _bench import Times, arguments, environment, interleave, table, target, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.seeds import generator
from neurograft.core.taps.reducers import Exemplars, Extremes, Moments, Rate, Reducer, Sample, Sums
from neurograft.core.taps.stream import observe
from neurograft.locators.grad_x_act import grad_x_act

HIDDEN, FFN, LAYERS, VOCABULARY, ROWS, LENGTH = 512, 1536, 8, 4096, 4, 256
FORWARD, MOMENTS, EVERYTHING = "forward", "mean, variance, rate", "every statistic"
BACKWARD, ATTRIBUTION = "forward and backward", "grad x act"


def base(layers: int) -> nn.Module:
    """Return the model, the same for everyone."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def few(n: int) -> Mapping[str, Reducer]:
    """Return the statistics of language neurons: how often and how strongly."""
    return {"moments": Moments(n), "rate": Rate(n)}


def every(n: int) -> Mapping[str, Reducer]:
    """Return all there is: moments, sums, rate, extremes, a sample for quantiles, ten exemplars."""
    more: dict[str, Reducer] = {"sums": Sums(n), "extremes": Extremes(n), "sample": Sample(n), "top": Exemplars(n)}
    return {**few(n), **more}


def contenders(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Callable[[], object]]:
    """Return what is compared, by name."""
    where = sites(model, "neuron")

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def backward() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()

    context = Context(model, where, batches, loss=lambda m, b: m(**b).loss)
    return {
        FORWARD: forward,
        MOMENTS: lambda: observe(model, where, batches, few),
        EVERYTHING: lambda: observe(model, where, batches, every),
        BACKWARD: backward,
        ATTRIBUTION: lambda: grad_x_act(context),
    }


def held(model: nn.Module, batches: list[dict[str, Tensor]]) -> int:
    """Return the bytes that all statistics hold after some batches."""
    found = observe(model, sites(model, "neuron"), batches, every)
    tensors = [t for r in found.values() for s in r.values() for t in vars(s).values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def targets(times: Times, clock: str) -> dict[str, Any]:
    """Return every ratio that has a target, beside it."""
    found = {}
    for mine, other, at_most in ((MOMENTS, FORWARD, 1.25), (EVERYTHING, FORWARD, 1.25), (ATTRIBUTION, BACKWARD, 1.15)):
        ratio = times.ratio(mine, other, clock=clock)
        found[f"time: {mine} / {other}"] = {**target(ratio["median"], at_most), **ratio}
    return found


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; exit status 1 if a target was missed."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu for a busy machine")
    parser.add_argument("--batches", type=int, default=2, help="batches in a round (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a slow machine (default: %(default)s)")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    where, model = environment(), base(given.layers)
    batches = []
    for i in range(max(4, given.batches)):
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator(given.seed, "batch", i))
        batches.append({"input_ids": tokens, "labels": tokens})
    made = contenders(model, batches[: given.batches])
    times = interleave(made, rounds=given.rounds, warmups=given.warmups, seed=given.seed)
    reached = targets(times, given.clock)
    memory = {n: held(model, batches[:n]) for n in (2, 4)}
    shape = {"hidden": HIDDEN, "ffn": FFN, "layers": given.layers, "vocabulary": VOCABULARY, "tokens": [ROWS, LENGTH]}
    payload = {
        "benchmark": "stream", "environment": where, "model": shape, "dtype": "float32", "batches": given.batches,
        "rounds": given.rounds, "warmups": given.warmups, "clock": given.clock, "targets": reached,
        "bytes_held_after_batches": memory, **times.summary(),
    }  # fmt: skip
    print(table([[n, f"{times.median(n, clock=given.clock):.3f}"] for n in made], ["contender", f"{given.clock} s"]))
    for name, found in reached.items():
        print(f"{'ok  ' if found['reached'] else 'MISS'} {name}: {found}")
    print(f"bytes held: {memory}")
    print(write("stream", payload, output=given.output))
    return 0 if all(found["reached"] for found in reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
