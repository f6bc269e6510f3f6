"""What selective tuning costs and buys on images: the rows that run on a vision transformer, and `nfts`.

    python benchmarks/selective_images.py [--seeds 3] [--steps 60] [--only NAME ...] [--picture FILE]

A tiny ViT (hidden 48, FFN 96, 4 layers, 77,530 numbers) that reads scikit-learn's digits, upright, turned by a
quarter and in negative, learns to read them in a new domain, their pixels mixed by an orthogonal matrix, from 5 images
of each class, of digits it was taught with in the other domains. Every contender sees these 50 images in each of 60
steps, AdamW or what its paper asks for, and the same learning rates; the one with the best accuracy on 197 validation
digits counts, and 400 test digits are read at that one alone. Kept: the loss of the head on the test digits in the
three domains it knew.

`nfts` trains no head: it moves features until a class lies near the mean of its examples. All others learn through
the head. So accuracy is that of the nearest class mean, by cosine, of the 50 images' features, for everyone; what the
head itself says of the new domain stands beside it, and *full, class means* is full fine-tuning with the loss of
`nfts`, to tell its search from its loss. `nfts` also looks again at the 3,600 images the model was taught with, for the
episodes of its supernet; nobody else does, and it may help to keep them.

Costs are those of `selective.py`, of `nfts` those of fine-tuning the path it keeps; the steps of its supernet, of its
search and of the other paths are among the steps in all. Its search is as small as the model: 60 episodes, 8 paths and
2 generations, 5 steps a path on 2 episodes, 3 paths kept; sizes set for other rows are in the results' `settings`. Its
step runs in a loop of its own, all others' in the Trainer, whose own work is a good part of a step of this size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from _costs import Costs, each_optimizer
from _rivals import Contender, Tuned, World, contenders, of_graft, ours
from _selective import SHOWN, board
from _selective import lines as lines_of
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import neurograft as ng
from neurograft.core.numerics.prototypes import class_means, cosines, prototypical
from neurograft.core.seeds import derive, generator
from neurograft.train.adaptable import pooled
from neurograft.worlds.tiny import fit as learn

KNOWN, TASK, SHOTS = ("plain", "turned", "negative"), "mixed", 5
TRAINED, VALIDATED = 1200, 1397  # of 1,797 digits: those up to here are for training, to here for validation
SEARCH: Mapping[str, Any] = {
    "ways": 10,
    "shots": SHOTS,
    "queries": 5,
    "episodes_to_train": 60,
    "episodes_to_search": 2,
    "population": 8,
    "top": 3,
    "generations": 2,
    "steps": 5,
}
SUPERNET_RATE = 3e-3


@cache
def digits(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the digits in a seed's order, [1797, 1, 8, 8] as each domain shows them, and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator(seed, "digits"))
    plain = (torch.tensor(found.images).float()[:, None] / 8 - 1)[order]
    mixing = torch.linalg.qr(torch.randn(64, 64, generator=generator(seed, "mixing"))).Q
    mixed = (plain.flatten(1) @ mixing).reshape(plain.shape)
    domains = {"plain": plain, "turned": plain.rot90(1, (2, 3)), "negative": -plain, "mixed": mixed}
    return domains, torch.tensor(found.target)[order]


@cache
def base(seed: int) -> nn.Module:
    """Return the vision transformer that reads digits in the known domains; to be left as found."""
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        initializer_range=0.1,  # at which so small a model learns in a few hundred steps
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "vit"))
        model = ViTForImageClassification(config)
    (domains, labels), rng = digits(seed), generator(seed, "order")
    images = torch.cat([domains[name][:TRAINED] for name in KNOWN])
    answers = labels[:TRAINED].repeat(len(KNOWN))
    drawn = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(8)])
    return learn(model, [{"pixel_values": images[rows], "labels": answers[rows]} for rows in drawn.split(64)])


@cache
def few(seed: int) -> Tensor:
    """Return which digits the task shows: the first of each class among those for training."""
    labels = digits(seed)[1][:TRAINED]
    return torch.cat([(labels == c).nonzero()[:SHOTS, 0] for c in range(10)])


@cache
def rows(seed: int) -> list[dict[str, Tensor]]:
    """Return the task's training rows."""
    domains, labels = digits(seed)
    return [{"pixel_values": domains[TASK][i], "labels": labels[i]} for i in few(seed).tolist()]


@torch.no_grad()
def read(model: nn.Module, seed: int) -> dict[str, float]:
    """Return accuracy by class means on validation and test rows, that of the head, and the loss on the known."""
    network: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    (domains, labels), of = digits(seed), pooled(network.eval())
    images, shown, test = domains[TASK], few(seed), slice(VALIDATED, None)
    means = class_means(of(pixel_values=images[shown]), labels[shown])

    def right(said: Tensor, where: slice) -> float:
        return float((said.argmax(-1) == labels[where]).float().mean())

    found = {
        name: right(cosines(of(pixel_values=images[where]), means), where)
        for name, where in (("validation", slice(TRAINED, VALIDATED)), ("test", test))
    }
    losses = [F.cross_entropy(network(pixel_values=domains[n][test]).logits, labels[test]) for n in KNOWN]
    head = right(network(pixel_values=images[test]).logits, test)
    return {**found, "head": head, "known": float(torch.stack(losses).mean())}


def by_class_means(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss that nfts trains a path with."""
    features = pooled(model)(pixel_values=batch["pixel_values"])
    return prototypical(features, batch["labels"], features, batch["labels"])


def kept_of(runs: Sequence[Costs], card: Mapping[str, Any]) -> Costs:
    """Return the run of the path that was kept: of those tuned last, all but a frozen one, that of the least loss."""
    losses = [loss for loss, path in zip(card["support_losses"], card["paths"]) if any(path)]
    return runs[len(runs) - len(losses) + losses.index(min(losses))]


def searched(world: World, seed: int, args: dict[str, Any], costs: Costs) -> Tuned:
    """Run nfts on episodes of the known domains and the task; its costs are those of the path it keeps."""
    (domains, labels), model = digits(seed), world.base(seed)
    groups = {
        name: [{"pixel_values": x, "labels": y} for x, y in zip(domains[name][:TRAINED], labels[:TRAINED])]
        for name in KNOWN
    } | {TASK: world.rows(seed)}
    changes = {**SEARCH, "lr": (SUPERNET_RATE, args["learning_rate"]), "steps_at_test": args["max_steps"], "task": TASK}
    with each_optimizer(model) as runs:
        graft = ng.run("nfts", model, groups, changes=changes, seed=seed).graft
    kept = kept_of(runs, graft.card)
    costs.become(kept, before=sum(len(run.seconds) for run in runs if run is not kept))
    return of_graft(graft)


WORLD = World(
    base=base,
    rows=rows,
    read=read,
    batch=10 * SHOTS,
    options={
        "smt": {"block": 8, "fraction": 0.05, "locate.match": "vit.layers.*"},
        "spectral_layers": {"locate.positions": "all"},
        "slicefine": {"steps": 10},
        "es_landscape": {"n": 8},
        "s2ft": {"fraction": 0.1},
        "lift": {"r": 8, "budget": 4, "interval": 20},
        "spafit": {"r": 4},
        "lisa": {"gamma": 1, "K": 10},
        "nfts": SEARCH,
    },
)
COLUMNS = {"test": SHOWN["test"], "head": "by its head"} | SHOWN | {"all_steps": "steps in all"}


def lines(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table as Markdown."""
    return lines_of(found, COLUMNS)


def rivals() -> dict[str, Contender]:
    """Return the contenders, by name."""
    return {**contenders(), "nfts": searched, "full, class means": ours(objective=by_class_means)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run every contender and write table and picture."""
    return board("selective_images", __doc__ or "", WORLD, rivals(), COLUMNS, argv)


if __name__ == "__main__":
    sys.exit(main())
