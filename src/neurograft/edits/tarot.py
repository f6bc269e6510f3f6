"""TaRot: heads are turned by angles that a search finds on a few examples, with forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, RunError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.intervene import Intervention
from neurograft.core.numerics.rotations import FORMS, numbers_of
from neurograft.core.numerics.search import Propose, drawn, search, uniform
from neurograft.core.selection import Selection
from neurograft.core.taps.folding import as_deltas
from neurograft.core.turn import Turn
from neurograft.edits._answers import METRICS, metric_of
from neurograft.edits._bayes import bayes

SHIPS = ("operations", "weights")


@method(
    paper="tarot",
    kinds={"head", "layer"},
    needs={"batches", "labels", "taps"},
    departs="The released loop gives the process the negated metric and then maximises the improvement over its "
    "minimum, so it looks for bad rotations; here the metric itself is maximised. The angles 0 are tried first "
    "(origin=False for the published four random starts alone) and a search that finds nothing better fails. The "
    "metric is a function of the angles: the number of shots is drawn once for each example, not at every try. "
    "Gaussian process by scikit-learn, its noise at least 1e-5 of the fitness's variance, its scale at the start such "
    "that the variance in the middle is 1; the climb of the acquisition starts at the best of the raw samples and "
    "makes at most 30 steps.",
)
def tarot(
    context: Context,
    where: Selection,
    *,
    form: str = "rotary",
    bound: float = math.pi / 4,
    metric: str = "probability",
    optimizer: str | Callable[..., Propose] = "bayes",
    starts: int = 4,
    iterations: int = 120,
    origin: bool = True,
    ship: str = "operations",
) -> Graft:
    """Turn what each unit says, x' = x @ R(theta), by the angles under which the examples' answers are likeliest.

    Args:
        context: model, batches with labelled answers, named generators.
        where: heads, or layers tapped at the FFN's output.
        form: "rotary" (w / 2 angles for a unit of w features), "givens" (w - 1), or "scale" (one factor in 0..1).
        bound: largest angle, radians; the paper's are pi / 4 and pi / 6.
        metric: of the answers' first tokens, mean: "probability", "accuracy", "logit" (minus the base's), "rank"
            (negated).
        optimizer: "bayes", "random", or a callable (low, high) -> ((found, generator) -> points [k, n]).
        starts: random points to begin with.
        iterations: points proposed after them.
        origin: try the unchanged model first.
        ship: "operations" (the angles) or "weights" (the output projection's columns, turned).

    Returns:
        A graft; its card holds the metric before and after, and the best so far after every try as `incumbents`.

    Raises:
        RequestError: an unknown word, no data or labels, units that have no such rotation, or whose rotation no
            weight can express.
        RunError: nothing was better than the base.

    Example:
        >>> from neurograft.anatomy.sites import sites
        >>> from neurograft.worlds.pico import pico, pico_batch
        >>> net = pico("llama")
        >>> heads = sites(net, "head")
        >>> where = Selection.of(heads, {next(iter(heads)): [0, 2]})
        >>> graft = tarot(Context(net, heads, [pico_batch(net)]), where, optimizer="random", iterations=9)
        >>> graft.card["angles"], graft.card["tries"], graft.card["metric_after"] > graft.card["metric_before"]
        (8, 14, True)
    """
    one_of(form, FORMS, what="form of rotation")
    one_of(ship, SHIPS, what="form of a graft")
    one_of(metric, METRICS, what="metric")
    chosen = {n: (where.sites[n], ids) for n, ids in where.ids.items() if len(ids)}
    if not context.batches or not chosen or not 0 < bound <= math.pi or starts + origin < 1:
        raise RequestError(
            f"{len(context.batches)} batches, {len(chosen)} sites, bound={bound}, {starts + origin} starts",
            expected="data, units, an angle in (0, pi], at least one start",
            do="give labelled examples and a selection of heads",
        )
    fitness = metric_of(metric, context)
    sizes = {n: (len(ids), numbers_of(form, s.tap.width if s.tap else 1)) for n, (s, ids) in chosen.items()}
    total = sum(k * m for k, m in sizes.values())
    low, high, still = _box(form, bound, total)
    propose = _proposer(optimizer)(low, high)
    first = drawn(low, high, starts, context.generator("tarot", "starts"))

    def turned(point: Tensor) -> list[Intervention]:
        parts = point.split([k * m for k, m in sizes.values()])
        return [_turn(form, *chosen[n], p.reshape(sizes[n])) for n, p in zip(chosen, parts)]

    def tried(point: Tensor) -> float:
        with _on(turned(point), context.model):
            return fitness(context.model)

    before = fitness(context.model)
    begin = torch.cat([still[None], first]) if origin else first
    found = search(begin, tried, propose, rounds=iterations, generator=context.generator("tarot", "proposals"))
    after = float(found.fitness.max())
    if after <= before:
        raise RunError(
            f"none of {found.tries} rotations has a better {metric} than the base's {before:.6g}; the best has "
            f"{after:.6g}: try more iterations, another metric, or other units"
        )
    made = turned(found.best)
    card: dict[str, Any] = {"edit": "tarot", "form": form, "metric": metric, "angles": total, "tries": found.tries}
    card |= {"metric_before": before, "metric_after": after, "incumbents": found.incumbents.tolist()}
    if ship == "weights":
        return Graft.made(context.model, as_deltas(context.model, made), card=card)
    return Graft.made(context.model, {}, operations=tuple(made), card=card)


def _box(form: str, bound: float, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bounds, and the point between them that changes nothing."""
    if form == "scale":
        return torch.zeros(total), torch.ones(total), torch.ones(total).double()
    return torch.full((total,), -bound), torch.full((total,), bound), torch.zeros(total).double()


def _turn(form: str, site: Any, ids: Tensor, numbers: Tensor) -> Intervention:
    if form == "scale":
        return Intervention(site, ids, "scale", numbers[:, 0].float())
    return Turn.by(site, ids, numbers, form)


@contextmanager
def _on(turns: Sequence[Intervention], model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for turn in turns:
            stack.callback(turn.mount(model).remove)
        yield


def _proposer(optimizer: Any) -> Callable[[Tensor, Tensor], Propose]:
    if callable(optimizer):
        return optimizer  # type: ignore[no-any-return]
    known: Mapping[str, Callable[[Tensor, Tensor], Propose]] = {"bayes": bayes, "random": uniform}
    return known[one_of(optimizer, known, what="optimizer")]
