"""What a graft costs that goes on and comes off, beside others it overlaps: alone, above 1, above 19, and in turn.

    python benchmarks/stack.py [--rounds 7] [--threads 1] [--dtype float32] [--clock cpu]

A Llama of 8 layers (hidden 1,024, FFN 4,096) from its config, and grafts of 2 % of the FFN neurons of every layer,
each half the neurons of the one before and half new ones. Every way on reads the base whole, to verify it: the first
time by its digest, from then on by a checksum ("digest" and "checksum" are the same reading alone). "anew" is what a
stack would do that combines every touched number again whenever one graft changes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from _bench import arguments, environment, interleave, table, target, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.checksum import checksum
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import Stack
from neurograft.core.region import Region, as_matrix, union
from neurograft.core.seeds import generator, seeded

LAYERS, HIDDEN, FFN, SHARE, GRAFTS = 8, 1024, 4096, 0.02, 20


def llama(dtype: torch.dtype) -> nn.Module:
    """Return the model, with random numbers."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=4096,
    )  # fmt: skip
    with seeded(0), torch.no_grad():
        return LlamaForCausalLM(config).to(dtype)


def grafts(model: nn.Module) -> list[Graft]:
    """Return the grafts; they are of one base, so its digests are read once."""
    rng, count = generator(0, "stack"), round(FFN * SHARE)
    orders = [torch.randperm(FFN, generator=rng) for _ in range(LAYERS)]
    made: list[Graft] = []
    for i in range(GRAFTS):
        deltas = {}
        for layer, order in enumerate(orders):
            ids = order[(torch.arange(count) + i * (count // 2)) % FFN]
            for part, layout, shape in (("gate", "rows", (FFN, HIDDEN)), ("up", "rows", (FFN, HIDDEN)),
                                        ("down", "cols", (HIDDEN, FFN))):  # fmt: skip
                region = Region.of(shape, layout, ids)
                values = 0.02 * torch.randn(region.values_shape, generator=rng)
                deltas[f"model.layers.{layer}.mlp.{part}_proj.weight"] = Slice(region, values)
        made.append(Graft(deltas, base=made[0].base) if made else Graft.made(model, deltas))
        assert made[-1].identity  # digests of the changes, once for every graft
    return made


def anew(model: nn.Module) -> None:
    """Combine and write every touched number again."""
    for name, ledger in Stack.of(model).ledgers.items():
        weight = model.get_parameter(name)
        region = union(member.region for member in ledger.members.values())
        region.write_(weight, ledger.rounded(region, ledger.under(region, region.read(weight))))


def in_turn(model: nn.Module, made: list[Graft]) -> None:
    """Put all grafts on, and take them off in the same order."""
    for graft in made:
        graft.apply(model)
    for graft in made:
        graft.remove(model)


def contenders(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return what is timed: the last graft on and off above others, all in turn, and what is read at least."""
    bare = llama(dtype)
    made = grafts(bare)
    below = {"alone": [], "above 1": made[-2:-1], "above 19": made[:-1]}
    models = {name: copy.deepcopy(bare) for name in below}
    for name, others in below.items():
        for graft in others:
            graft.apply(models[name])
    weights = [bare.get_parameter(name) for name in made[0].deltas]
    found: dict[str, Callable[[], object]] = {
        f"on and off, {name}": lambda model=model: made[-1].remove(made[-1].apply(model))  # type: ignore[misc]
        for name, model in models.items()
    }
    return found | {
        f"{GRAFTS} on and off": lambda: in_turn(bare, made),
        "anew": lambda: anew(models["above 19"]),
        "digest": lambda: [tensor_digest(w) for w in weights],
        "checksum": lambda: [checksum(w, range(len(w)), as_matrix(tuple(w.shape)), []) for w in weights],
    }


def main(words: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], rounds=7, threads=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    where, made = environment(), contenders(getattr(torch, given.dtype))
    times = interleave(made, rounds=given.rounds, warmups=given.warmups, seed=given.seed)
    print(table([[n, f"{times.median(n, clock=given.clock):.3f}"] for n in made], ["what", "seconds"]))
    deeper = times.ratio("on and off, above 19", "on and off, above 1", clock=given.clock)
    payload = {
        "benchmark": "stack", "environment": where, "clock": given.clock, "rounds": given.rounds, "dtype": given.dtype,
        "model": {"layers": LAYERS, "hidden": HIDDEN, "ffn": FFN}, "grafts": GRAFTS, "share_of_neurons": SHARE,
        "above_19_to_above_1": deeper, "targets": {"above_19_to_above_1": target(deeper["median"], 2.0)},
        **times.summary(),
    }  # fmt: skip
    name = "stack" if given.dtype == "float32" else f"stack_{given.dtype}"
    print(write(name, payload, output=given.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
