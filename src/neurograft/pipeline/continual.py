"""Tasks one after the other: what was learned, kept, lost, and carried over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.graft import Graft


@dataclass(frozen=True)
class Continual:
    """The matrix of a sequence of tasks and its summaries.

    Args:
        names: the tasks, in the order they were learned.
        matrix: R[t][i], the score on task i after task t was learned, higher is better, float64 [T, T].
        base: the score on each task before any was learned, [T].
        alone: the score on each task learned by itself, [T], or None if that was not measured.
        grafts: what each task left behind; empty if the learner gives none.

    Example:
        >>> run = Continual(("a", "b"), torch.tensor([[0.8, 0.3], [0.6, 0.9]]), torch.tensor([0.1, 0.2]))
        >>> round(run.average, 3), round(run.backward_transfer, 3), round(run.forgetting, 3)
        (0.75, -0.2, 0.2)
        >>> round(run.forward_transfer, 3)
        0.1
    """

    names: tuple[str, ...]
    matrix: Tensor
    base: Tensor
    alone: Tensor | None = None
    grafts: tuple[Graft, ...] = ()

    @property
    def average(self) -> float:
        """Mean over tasks of R[T][i]: average accuracy at the end."""
        return float(self.matrix[-1].mean())

    @property
    def backward_transfer(self) -> float:
        """Mean over i < T of R[T][i] - R[i][i]: what later tasks did to earlier ones; negative is loss."""
        if len(self.names) < 2:
            return 0.0
        return float((self.matrix[-1] - self.matrix.diagonal())[:-1].mean())

    @property
    def forgetting(self) -> float:
        """Mean over i < T of max over t < T of R[t][i], less R[T][i]; never below -1 x the largest late gain."""
        if len(self.names) < 2:
            return 0.0
        best = torch.stack([self.matrix[i:-1, i].max() for i in range(len(self.names) - 1)])
        return float((best - self.matrix[-1, :-1]).mean())

    @property
    def forward_transfer(self) -> float:
        """Mean over i > 1 of R[i-1][i] - base[i]: what a task gains before it is learned (Lopez-Paz & Ranzato 2017,
        with the untouched base in the place of a random start)."""
        if len(self.names) < 2:
            return 0.0
        before = self.matrix.diagonal(1)
        return float((before - self.base[1:]).mean())

    @property
    def intransigence(self) -> float | None:
        """Mean of alone[i] - R[i][i]: what having learned others costs in learning a new one; None if not measured."""
        return None if self.alone is None else float((self.alone - self.matrix.diagonal()).mean())

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "names": list(self.names),
            "matrix": self.matrix.tolist(),
            "base": self.base.tolist(),
            "alone": None if self.alone is None else self.alone.tolist(),
            "average": self.average,
            "backward_transfer": self.backward_transfer,
            "forgetting": self.forgetting,
            "forward_transfer": self.forward_transfer,
            "intransigence": self.intransigence,
        }


def continual(
    model: nn.Module,
    tasks: Mapping[str, tuple[Any, Any]],
    *,
    learn: Callable[[nn.Module, Any, str], Graft | None],
    score: Callable[[nn.Module, Any], float],
    alone: bool = False,
) -> Continual:
    """Learn tasks in order, measuring all of them after each; the model is left as found.

    Args:
        model: the model.
        tasks: name -> (data to learn from, data to score on), in the order of learning.
        learn: (model, data, name) -> the graft of that task, e.g. `ng.tune` with the data and a selection. It is
            applied on top of the earlier ones. One that returns None must have changed the model itself, and
            answers for undoing it.
        score: (model, data) -> a number, higher is better.
        alone: also learn every task by itself on the base, for `intransigence`; the learner must return grafts.

    Raises:
        RequestError: no tasks, or `alone` with a learner that returns no graft.
        RunError: a score that is not finite.

    Example:
        >>> from neurograft.core.grafts.delta import Slice
        >>> from neurograft.core.region import Region
        >>> net = nn.Linear(1, 2, bias=False)
        >>> before = net.weight.detach().clone()
        >>> def learn(model, row, name):
        ...     return Graft.made(model, {"weight": Slice(Region.of((2, 1), "rows", [row]), torch.ones(1, 1))})
        >>> def score(model, row):
        ...     return float(model.weight[row] == 1)
        >>> run = continual(net, {"a": (0, 0), "b": (1, 1)}, learn=learn, score=score)
        >>> run.matrix.tolist(), torch.equal(net.weight, before)
        ([[1.0, 0.0], [1.0, 1.0]], True)
    """
    if not tasks:
        raise RequestError("no tasks", expected="at least one", do="give name -> (data, test)")
    names = tuple(tasks)
    grafts: list[Graft] = []

    def scores(now: Sequence[str]) -> list[float]:
        found = [float(score(model, tasks[n][1])) for n in now]
        if not torch.isfinite(torch.tensor(found)).all():
            raise RunError(f"scores of {', '.join(now)} that are not finite: {found}")
        return found

    base = scores(names)
    single = [_by_itself(model, tasks[n][0], n, learn, scores) for n in names] if alone else None
    rows = []
    try:
        for name in names:
            graft = learn(model, tasks[name][0], name)
            if graft is not None:
                graft.apply(model)
                grafts.append(graft)
            rows.append(scores(names))
    finally:
        for graft in reversed(grafts):
            graft.remove(model)
    lone = None if single is None else torch.tensor(single, dtype=torch.float64)
    matrix, start = torch.tensor(rows, dtype=torch.float64), torch.tensor(base, dtype=torch.float64)
    return Continual(names, matrix, start, lone, tuple(grafts))


def _by_itself(
    model: nn.Module,
    data: Any,
    name: str,
    learn: Callable[..., Graft | None],
    scores: Callable[[Sequence[str]], list[float]],
) -> float:
    graft = learn(model, data, name)
    if graft is None:
        raise RequestError(
            "alone=True with a learner that returns no graft", expected="a graft", do="return ng.tune(...) from it"
        )
    with graft.on(model):
        return scores([name])[0]
