"""What is asked of the model in a step: an objective, and anchors beside it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.choose import Chosen, choose
from neurograft.core.context import Batch, Step
from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator


@dataclass(frozen=True)
class Anchor:
    """A second objective with a weight, on the batch of the step or on batches of its own.

    Args:
        asked: the method.
        weight: factor of its loss.
        batches: its own data; None to use the batch of the step.
        seed: names the order in which its data is drawn.
    """

    asked: Chosen
    weight: float = 1.0
    batches: Sequence[Batch] | None = None
    seed: int = 0

    def batch(self, draw: int) -> Batch | None:
        """Return the batch of the draw of that number: a new order in every round, the same after a resume."""
        if self.batches is None:
            return None
        around, place = divmod(draw, len(self.batches))
        order = torch.randperm(len(self.batches), generator=generator(self.seed, "anchor", around))
        return self.batches[int(order[place])]


@dataclass(frozen=True)
class Asked:
    """An objective and its anchors, as one loss.

    Args:
        objective: the method.
        anchors: added to it in training, never in evaluation.
    """

    objective: Chosen
    anchors: tuple[Anchor, ...] = ()

    @staticmethod
    def of(
        objective: Any, anchor: Any = None, *, prepare: Callable[[Any], Sequence[Batch]] = list, seed: int = 0
    ) -> Asked:
        """Resolve choices.

        Args:
            objective: a choice of `objectives`, or a callable (model, batch) -> loss.
            anchor: None, one choice or a list of them; the options may hold `weight` and `data`.
            prepare: turns an anchor's `data` into batches.
            seed: names the order of anchors' data.

        Raises:
            RequestError: an unknown method or option, or an anchor without data.
        """
        several = anchor if isinstance(anchor, list) else [] if anchor is None else [anchor]
        anchors = tuple(_anchor(a, prepare, seed) for a in several)
        return Asked(choose("objectives", adapted(objective)), anchors)

    def loss(self, step: Step, *, windows: int = 1, world: int = 1, draw: int = 0, anchored: bool = True) -> Tensor:
        """Return the batch's share of the accumulation window's loss.

        Args:
            step: the batch.
            windows: batches in the accumulation window, to average what does not count labels.
            world: processes whose gradients are averaged, if `step.items` counts the labels of all of them.
            draw: number of the batch since the start, for anchors with data of their own.
            anchored: add the anchors.

        Raises:
            RequestError: the objective returns no scalar.
        """
        total = _share(self.objective, step, windows, world)
        for anchor in self.anchors if anchored else ():
            own = anchor.batch(draw)
            at = step if own is None else _apart(step, own)
            total = total + anchor.weight * _share(anchor.asked, at, windows, world)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a card."""
        anchors = [{**a.asked.as_dict(), "weight": a.weight, "own_data": a.batches is not None} for a in self.anchors]
        return {"objective": self.objective.as_dict(), **({"anchors": anchors} if anchors else {})}


def _apart(step: Step, batch: Batch) -> Step:
    """Return the step on another batch: a plain one, since a fused head's outputs are of the step's own batch."""
    return Step(
        step.model, batch, step.step, step.max_steps, None, step.reference, wrapped=step.wrapped, trained=step.trained
    )


def _share(asked: Chosen, step: Step, windows: int, world: int) -> Tensor:
    step.counted = False
    found = asked(step)
    if isinstance(found, (float, int)):  # a metric, for optimizers that ask for numbers only
        found = torch.tensor(float(found), dtype=torch.float64)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise RequestError(
            f"{type(found).__name__} {tuple(getattr(found, 'shape', ()))} from the objective {asked.name}",
            expected="a scalar tensor",
            do="return the mean of the losses",
        )
    return found.reshape(()) * world if step.counted else found.reshape(()) / windows


def _anchor(choice: Any, prepare: Callable[[Any], Sequence[Batch]], seed: int) -> Anchor:
    options: dict[str, Any] = {}
    if isinstance(choice, tuple) and len(choice) == 2:
        choice, options = choice[0], dict(choice[1])
    weight, data = _number(options.pop("weight", 1.0)), options.pop("data", None)
    batches = None if data is None else list(prepare(data))
    if batches is not None and not batches:
        raise RequestError("an anchor with empty data", expected="at least one batch", do="give data, or leave it out")
    return Anchor(choose("objectives", adapted(choice), **options), weight, batches, seed)


def _number(weight: Any) -> float:
    try:
        found = float(weight)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise RequestError(f"an anchor of weight {weight!r}", expected="a number", do="give it as {'weight': 0.5}")
    return found


def adapted(choice: Any) -> Any:
    """Turn a callable (model, batch) -> loss into an objective; pass any other choice through.

    Example:
        >>> asked = adapted(lambda model, batch: batch["x"].sum())
        >>> float(asked(Step(torch.nn.Identity(), {"x": torch.ones(2)})))
        2.0
    """
    if not callable(choice) or isinstance(choice, Chosen) or hasattr(choice, "card"):
        return choice
    parameters = inspect.signature(choice).parameters.values()
    wanted = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(wanted) != 2:
        return choice

    def of_model_and_batch(step: Step) -> Tensor:
        found: Tensor = choice(step.call, step.batch)
        return found

    of_model_and_batch.__module__ = getattr(choice, "__module__", "?")
    of_model_and_batch.__qualname__ = getattr(choice, "__qualname__", type(choice).__name__)
    return of_model_and_batch


def bound(objective: Any) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a choice of objective as (model, batch) -> loss, for locators and audits.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> bound(lambda model, batch: model(batch["x"]).sum())(net, {"x": torch.zeros(1, 2)}).shape
        torch.Size([])
    """
    asked = Asked.of(objective)
    return lambda model, batch: asked.loss(Step(model, batch))
