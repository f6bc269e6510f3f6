"""What a training step costs: compact training against its floor, PEFT's LoRA and SHiRA, and full fine-tuning.

    python benchmarks/train_step.py [--rounds 15] [--threads 2] [--clock wall|cpu]

A Llama-type model, hidden 512, FFN 1536, 8 layers, 1,024 tokens a step, float32. The floor is a forward and a
backward pass to the embedding with nothing trained. `least` is a pass that no exact way of training neurons of every
layer can do without: its gradients end at the lowest layer's FFN output. Every other contender also steps fused AdamW.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from _bench import Times, arguments, environment, interleave, table, target, write
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from neurograft.adapters.slice import slice as compact
from neurograft.core.compact.meter import saved
from neurograft.core.compact.mount import Mount
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.units import Part, Site

HIDDEN, FFN, LAYERS, VOCABULARY, ROWS, LENGTH = 512, 1536, 8, 4096, 4, 256
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FLOOR, LEAST = "floor", "least"
NEURONS, PLAIN, UPPER = "neurons 2 %", "neurons 2 %, torch's kernels", "neurons 2 %, upper half of the layers"
ENTRIES, LORA, SHIRA, FULL = "one weight per row", "LoRA r=8", "SHiRA, same entries", "full fine-tuning"


@dataclass
class Contender:
    """A model and what is trained in it.

    Args:
        model: called with the batch.
        trained: tensors that the optimizer steps; none for the floor.
        mount: the attachment, for our own contenders.
        own: whether our products may take another kernel than torch's.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    mount: Mount | None = None
    own: bool = True

    def prepared(self, batch: dict[str, Tensor]) -> Callable[[], None]:
        """Return one training step."""
        optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True) if self.trained else None

        def step() -> None:
            with nullcontext() if self.own else torch.backends.mkldnn.flags(enabled=False):
                self.model(**batch).loss.backward()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()

        return step

    def saved_bytes(self, batch: dict[str, Tensor]) -> int:
        """Return what one forward pass keeps for its backward pass."""
        with saved(self.model) as meter:
            loss = self.model(**batch).loss
            found = meter.bytes
        loss.backward()
        self.model.zero_grad()
        return found


def base() -> LlamaForCausalLM:
    """Build the frozen model, the same every time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).requires_grad_(False).train()


def neurons(model: nn.Module, layers: Iterable[int], fraction: float) -> Selection:
    """Choose FFN neurons at random: rows of gate and up, columns of down."""
    sites, ids = {}, {}
    for layer in layers:
        mlp = f"model.layers.{layer}.mlp"
        rows = [Part.rows(f"{mlp}.{n}.weight", (FFN, HIDDEN)) for n in ("gate_proj", "up_proj")]
        parts = (*rows, Part.columns(f"{mlp}.down_proj.weight", (HIDDEN, FFN)))
        sites[mlp] = Site(mlp, "neuron", FFN, parts, layer=layer)
        ids[mlp] = torch.randperm(FFN, generator=generator(0, mlp))[: round(fraction * FFN)]
    return Selection.of(sites, ids)


def entries(model: nn.Module) -> Selection:
    """Choose one entry at random in every row of every linear layer."""
    sites, ids = {}, {}
    for name, module in model.named_modules():
        if name.endswith(LINEARS):
            rows, columns = module.weight.shape
            sites[name] = Site(name, "weight", rows * columns, (Part.entries(f"{name}.weight", rows * columns),))
            ids[name] = torch.arange(rows) * columns + torch.randint(columns, (rows,), generator=generator(0, name))
    return Selection.of(sites, ids)


def mounted(where: Callable[[nn.Module], Selection], *, own: bool = True) -> Contender:
    """Attach a selection to a fresh base."""
    model = base()
    mount = compact(model, where(model))
    return Contender(model, mount.parameters(), mount, own)


def lora() -> Contender:
    """PEFT LoRA on all linear layers."""
    model = get_peft_model(base(), LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEARS), task_type="CAUSAL_LM"))
    return Contender(model, [p for p in model.parameters() if p.requires_grad])


def shira() -> Contender:
    """PEFT SHiRA cut to exactly the entries of "one weight per row"; by itself it takes at least in + out of them."""
    where = entries(base())
    model: Any = get_peft_model(base(), ShiraConfig(r=1, target_modules=list(LINEARS), task_type="CAUSAL_LM"))
    for name, ids in where.ids.items():
        layer = model.base_model.model.get_submodule(name)
        columns = layer.in_features
        layer.shira_indices["default"] = torch.stack([ids // columns, ids % columns]).int()
        layer.shira_weight["default"] = nn.Parameter(torch.zeros(len(ids)))
    return Contender(model, [p for p in model.parameters() if p.requires_grad])


def floor() -> Contender:
    """Nothing trained, gradients down to the embedding's output."""
    model = base()
    model.enable_input_require_grads()
    return Contender(model, [])


def least() -> Contender:
    """Nothing trained, gradients down to the output of the lowest layer's FFN."""
    model = base()
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return Contender(model, [])


def full() -> Contender:
    """Every parameter trained."""
    model = base().requires_grad_(True)
    return Contender(model, list(model.parameters()))


CONTENDERS: dict[str, Callable[[], Contender]] = {
    FLOOR: floor,
    LEAST: least,
    NEURONS: lambda: mounted(lambda m: neurons(m, range(LAYERS), 0.02)),
    PLAIN: lambda: mounted(lambda m: neurons(m, range(LAYERS), 0.02), own=False),
    UPPER: lambda: mounted(lambda m: neurons(m, range(LAYERS // 2, LAYERS), 0.02)),
    ENTRIES: lambda: mounted(entries),
    LORA: lora,
    SHIRA: shira,
    FULL: full,
}


def targets(times: Times, kept: dict[str, int], clock: str) -> dict[str, Any]:
    """Return every ratio that has a target, beside it."""
    pairs = [(NEURONS, FLOOR, 1.03), (NEURONS, LORA, 0.80), (UPPER, FLOOR, 0.75), (ENTRIES, SHIRA, 0.92)]
    found: dict[str, Any] = {}
    for mine, other, at_most in pairs:
        if mine in kept and other in kept:
            ratio = times.ratio(mine, other, clock=clock)
            found[f"time: {mine} / {other}"] = {**target(ratio["median"], at_most), **ratio}
    for mine, other in [(PLAIN, FLOOR), (PLAIN, LORA), (LEAST, LORA)]:
        if mine in kept and other in kept:
            found[f"time: {mine} / {other}"] = times.ratio(mine, other, clock=clock)
    if NEURONS in kept and LORA in kept:
        found[f"saved bytes: {NEURONS} / {LORA}"] = target(kept[NEURONS] / kept[LORA], 0.80)
    return found


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; exit status 1 if a target was missed."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu for a busy machine")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="contenders, whole names")
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    where = environment()
    rng = generator(given.seed, "batch")
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=rng)
    batch = {"input_ids": tokens, "labels": tokens}
    made = {name: CONTENDERS[name]() for name in given.only}
    kept = {name: c.saved_bytes(batch) for name, c in made.items()}
    times = interleave(
        {name: c.prepared(batch) for name, c in made.items()},
        rounds=given.rounds, warmups=given.warmups, seed=given.seed,
    )  # fmt: skip
    reached = targets(times, kept, given.clock)
    model = {"hidden": HIDDEN, "ffn": FFN, "layers": LAYERS, "vocabulary": VOCABULARY, "tokens": [ROWS, LENGTH]}
    payload = {
        "benchmark": "train_step", "environment": where, "model": model, "dtype": "float32",
        "rounds": given.rounds, "warmups": given.warmups, "clock": given.clock, "targets": reached,
        "saved_mib": {n: round(b / 2**20, 2) for n, b in kept.items()},
        "trained_numbers": {n: sum(p.numel() for p in c.trained) for n, c in made.items()}, **times.summary(),
    }  # fmt: skip
    rows = [[n, f"{times.median(n, clock=given.clock):.3f}", f"{kept[n] / 2**20:.1f}"] for n in made]
    print(table(rows, ["contender", f"step ({given.clock} s)", "saved (MiB)"]))
    for name, found in reached.items():
        print(f"{'    ' if 'reached' not in found else 'ok  ' if found['reached'] else 'MISS'} {name}: {found}")
    print(write("train_step", payload, output=given.output))
    return 0 if all(found.get("reached", True) for found in reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
