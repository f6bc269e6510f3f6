"""What selective tuning costs and buys: every row of the papers about it, one model, one task, one sweep.

    python benchmarks/selective.py [--seeds 3] [--steps 60] [--only NAME ...] [--picture FILE]

A tiny Llama (hidden 64, FFN 128, 4 layers, about 170,000 numbers) that copies and reverses letters learns to say in
which third of the alphabet the first letter is. Every contender sees the same 40 batches of 32 rows in the same order,
AdamW or what its paper asks for, and the same learning rates; the one with the best accuracy on validation rows
counts, and test rows are read at that one alone. Kept: the loss on what the model knew.

Costs are those of the training itself: seconds of a step beside full fine-tuning in turn with it, bytes autograd saves
for one step, bytes of gradients when the optimizer steps, of the optimizer's state at the end, numbers in the graft
and its file. What was trained before (a first full phase, a search) is in `all_steps`. A model this small says little
about time: most of a step is overhead, and while the checked-in numbers were made the second core was busy too.

Beside the rows: full fine-tuning, PEFT's LoRA, SHiRA and Super-Tuning, and random neurons. `nfts`, which searches over
episodes of images, is in [the table on images](selective_images.md), with all the others that run there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

import torch
from _rivals import World, contenders
from _selective import SHOWN, board, lines
from torch import Tensor, nn

from neurograft.core.context import Step
from neurograft.worlds.mixture import mixture
from neurograft.worlds.tiny import fit as learn
from neurograft.worlds.tiny import llama

__all__ = ["lines"]  # what the docs show

KNOWN, TASK, BATCH = ("copy", "reverse"), "first", 32


@cache
def base(seed: int) -> nn.Module:
    """Return the model that knows how to copy and to reverse; to be left as found."""
    model = llama(seed, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_key_value_heads=4)
    return learn(model, mixture(KNOWN, count=400, batch=BATCH, length=3, seed=seed), lr=4e-3)


@cache
def rows(seed: int) -> list[dict[str, Tensor]]:
    """Return training rows."""
    batches = mixture((TASK,), count=40, batch=BATCH, length=3, seed=50 + seed)
    return [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(BATCH)]


def accuracy(model: nn.Module, *, seed: int) -> float:
    """Return the share of right answers to 512 rows of the task."""
    with torch.no_grad():
        logits, labels = Step(model.eval(), mixture((TASK,), count=1, batch=512, length=3, seed=seed)[0]).scored()
    return float((logits.argmax(-1) == labels).float().mean())


def known(model: nn.Module) -> float:
    """Return the loss on what the model knew."""
    with torch.no_grad():
        step = Step(model.eval(), mixture(KNOWN, count=1, batch=512, length=3, seed=91)[0])
        return float(step.log_probs.mean().neg())


def read(model: nn.Module, seed: int) -> dict[str, float]:
    """Return validation and test accuracy and the loss on what was known."""
    return {"validation": accuracy(model, seed=92), "test": accuracy(model, seed=93), "known": known(model)}


WORLD = World(
    base=base,
    rows=rows,
    read=read,
    batch=BATCH,
    task="CAUSAL_LM",
    # The papers' sizes are those of models ten thousand times larger.
    options={
        "smt": {"block": 8, "fraction": 0.05},
        "s2ft": {"fraction": 0.1},
        "lift": {"r": 8, "budget": 4, "interval": 20},
        "spafit": {"middle": "norm", "r": 4},
        "lisa": {"gamma": 1, "K": 10},
        "slicefine": {"steps": 10},
        "revffn": {"warmup": 20},
    },
    absent={
        "es_landscape": "30 perturbed models a step, half an hour: --only es_landscape",
        "nfts": "a search over episodes of images, on a ViT or a ResNet: in [the table on images](selective_images.md)",
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every contender and write table and picture."""
    return board("selective", __doc__ or "", WORLD, contenders(), SHOWN, argv)


if __name__ == "__main__":
    sys.exit(main())
