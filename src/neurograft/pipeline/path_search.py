"""A step of recipes: which units of a backbone to tune and which to adapt, found by searching a supernet's paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from neurograft.core.compact.mount import matrix_of
from neurograft.core.errors import RequestError, RunError, one_of
from neurograft.core.grafts.coordinates import coordinates
from neurograft.core.grafts.delta import Delta, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.numerics.evolve import bits, diverse, evolution
from neurograft.core.numerics.search import search
from neurograft.core.seeds import generator
from neurograft.pipeline._episodes import domain, episodes, support
from neurograft.pipeline._narrow import narrow_change
from neurograft.pipeline.grouped import grouped_rows
from neurograft.pipeline.inputs import as_dataset
from neurograft.pipeline.rows import Row
from neurograft.pipeline.state import as_found
from neurograft.train.adaptable import units_of
from neurograft.train.supernet import Episode, Supernet

OPTIMIZERS = ("Adadelta", "Adam", "AdamW", "SGD")


def path_search(
    state: Mapping[str, Any],
    *,
    task: str | None = None,
    ways: int = 5,
    shots: int = 5,
    queries: int = 16,
    episodes_to_train: int = 50_000,
    episodes_to_search: int = 100,
    population: int = 64,
    top: int = 8,
    mutation: float = 0.05,
    generations: int = 15,
    count: int = 3,
    apart: float | None = None,
    steps: int = 40,
    steps_at_test: int = 20,
    optimizer: str | None = None,
    lr: tuple[float, float] | None = None,
    decay: float = 0.01,
    prefix: int = 1,
) -> dict[str, Any]:
    """Train a supernet on episodes, search its paths, and fine-tune the best few on the new task's examples.

    Args:
        state: the model, and data in groups: every group a domain, one of them the new task.
        task: the group to adapt to, every row of it support; the last if None.
        ways: classes in an episode.
        shots: examples of each in its support.
        queries: examples of each in its query.
        episodes_to_train: steps of the supernet.
        episodes_to_search: episodes a path's fitness is the mean over, the same for all.
        population: paths to begin with.
        top: paths that breed.
        mutation: chance that a bit flips.
        generations: rounds of breeding.
        count: N, paths kept.
        apart: T, their least cosine distance; 0.4 for convolutions, 0.2 for blocks, if None.
        steps: of fine-tuning in the search.
        steps_at_test: of fine-tuning on the task.
        optimizer: "Adadelta", "Adam", "AdamW" or "SGD"; "Adadelta" for convolutions and "AdamW" for blocks if None.
        lr: of training, and of fine-tuning; (0.05, 0.1) and (7e-5, 3e-6) if None.
        decay: weight decay.
        prefix: tokens of a block's prefix.

    Returns:
        `graft`, `found` (every path with its fitness), `paths` (those kept) and `supernet`.

    Raises:
        RequestError: fewer than two groups, an unknown one, too few examples, a model without units.
        RunError: the path kept is the frozen backbone, which is no change.
    """
    model, seed = state["model"], state["common"]["seed"]
    numbers = (shots, queries, episodes_to_train, episodes_to_search, population, count, steps, steps_at_test, prefix)
    _check(ways, numbers, lr)
    groups, name = _groups(state["data"], task)
    device = next(model.parameters()).device
    reading = {"processing_class": state["common"].get("processing_class")}
    domains = {n: domain(n, as_dataset(rows, model, **reading), device) for n, rows in groups.items()}
    new = support(domains.pop(name))
    units = units_of(model)
    blocks = units[0].attention is not None
    algorithm = one_of(optimizer or ("AdamW" if blocks else "Adadelta"), OPTIMIZERS, what="optimizer")
    how: dict[str, Any] = {"optimizer": algorithm, "decay": decay}
    slow = lr or ((7e-5, 3e-6) if blocks else (0.05, 0.1))
    drawn: dict[str, Any] = {"ways": ways, "shots": shots, "queries": queries}
    with as_found(model):
        net = Supernet(model, units, prefix=prefix, seed=seed)
        train = episodes(domains, episodes_to_train, **drawn, rng=generator(seed, "episodes", "train"))
        net.train(train, lr=slow[0], **how)
        asked = list(episodes(domains, episodes_to_search, **drawn, rng=generator(seed, "episodes", "search")))
        found = search(
            bits(population, 2 * len(units), generator(seed, "paths")),
            fitness_of(net, asked, steps=steps, lr=slow[1], **how),
            evolution(top=top, mutation=mutation),
            rounds=generations,
            generator=generator(seed, "evolution"),
        )
        least = apart if apart is not None else 0.2 if blocks else 0.4
        paths = diverse(found, count=count, apart=least)
        path, own, losses = kept(net, paths, new, steps=steps_at_test, lr=slow[1], **how)
        card = {
            "search": {"units": [u.name for u in units], "path": path.int().tolist(), "tries": found.tries},
            "fitness": float(found.fitness.max()),
            "paths": paths.int().tolist(),
            "support_losses": losses,
            "task": name,
        }
        graft = grafted(model, net, path, own, card)
    return {"graft": graft, "found": found, "paths": paths, "supernet": net}


def _check(ways: int, numbers: tuple[int, ...], lr: tuple[float, float] | None) -> None:
    if ways < 2 or min(numbers) < 1 or (lr is not None and len(lr) != 2):
        raise RequestError(
            f"ways={ways}, lr={lr} and the numbers {', '.join(map(str, numbers))} of examples, episodes and steps",
            expected="two classes or more, two learning rates or none, numbers from 1",
            do="change them as ways=5 shots=5 queries=16",
        )


def _groups(data: Any, task: str | None) -> tuple[dict[str, list[Row]], str]:
    """Return the data by group, and the group that is the task."""
    groups = grouped_rows(data)
    name = list(groups)[-1] if task is None else task
    if name not in groups or len(groups) < 2:
        raise RequestError(
            f"the task {name!r} among the groups {', '.join(groups)}",
            expected="one of them, and at least one other to learn from",
            do="name the task's group in task=",
        )
    return groups, name


def fitness_of(net: Supernet, asked: list[Episode], **how: Any) -> Callable[[Tensor], float]:
    """Return path -> accuracy on the queries after fine-tuning on each support, averaged over episodes."""

    def fitness(path: Tensor) -> float:
        hits = [net.accuracy(path, e, net.tuned(path, e, **how)[0]) for e in asked]
        return sum(hits) / len(hits)

    return fitness


def kept(net: Supernet, paths: Tensor, new: Episode, **how: Any) -> tuple[Tensor, dict[str, Tensor], list[float]]:
    """Fine-tune every path on the task's support, each from the supernet, and keep that of the lowest support loss."""
    tries = [net.tuned(path, new, **how) for path in paths]
    losses = [loss for _, loss in tries]
    best = min(range(len(paths)), key=lambda i: losses[i])
    return paths[best], tries[best][0], losses


def grafted(model: nn.Module, net: Supernet, path: Tensor, own: Mapping[str, Tensor], card: Mapping[str, Any]) -> Graft:
    """Return a fine-tuned path as a graft: weights as they became, prefixes as operations."""
    where, deltas = coordinates(model), dict[str, Delta]()
    for name, weight in net.weights(path, own).items():
        base = net.base[name]
        change = narrow_change(base, weight, matrix_of(model, name, tuple(base.shape)))
        if change is None:
            continue
        for piece in where.to_checkpoint(name, change.region):
            deltas[piece.name] = Slice(piece.region, piece.take(change.values))
    prefixes = tuple(net.prefixes(path, own))
    if not deltas and not prefixes:
        raise RunError("the frozen backbone is the path with the lowest support loss: there is nothing to ship")
    return Graft.made(model, deltas, operations=prefixes, card=card)
