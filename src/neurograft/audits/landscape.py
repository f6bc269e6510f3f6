"""What random perturbations find around a model: is there something to select, and has a training passed its peak?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._changes import as_change
from neurograft.audits._scoring import scored
from neurograft.core.card import method
from neurograft.core.compact.shift import Shift
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, RunError
from neurograft.core.numerics.noise import grain
from neurograft.core.seeds import derive

Reward = Callable[[nn.Module, Batch], float]
WINDOWS = 10


@method(
    paper="es-landscape",
    needs={"batches", "labels"},
    claims={"empty_is_zero"},
    departs="The mean of the best of n is taken over all ways to draw n of the probes with replacement, in closed "
    "form, and not over some of them. The diagnosis of a peak is ours.",
)
def landscape(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    sigma: float = 1e-3,
    probes: int = 240,
    best: Sequence[int] = (1, 2, 5, 10, 20, 30, 60, 120),
    reward: Reward | None = None,
    top: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how much better the best of n models theta + sigma eps is, as a share of the headroom.

    gain(n) = (E[max of n rewards] - J) / (top - J), with J the reward of the model itself.

    Args:
        model: the base.
        change: a graft, grafts, or a tuned model.
        batches: data.
        sigma: the distance, the same for all models compared.
        probes: perturbed models; each is run once.
        best: values of n.
        reward: (model, batch) -> number, more is better, averaged over batches; the share of labelled places whose
            label is the likeliest if None.
        top: the best reward possible.
        seed: names the perturbations.

    Returns:
        `base` and `changed`: for each its `reward`, the probes' `rewards`, `better` (the share of them above the
        model) and `gain` by n, all None where nothing is left to gain; `course`: what `peaked` says of the losses on a
        graft's card, None without enough of them.

    Raises:
        RequestError: no batches, no probes, or no distance.
    """
    if not batches or probes < 2 or sigma <= 0:
        raise RequestError(
            f"{len(batches)} batches, {probes} probes at sigma={sigma}",
            expected="data, two probes and a positive distance",
            do="give data and leave the rest as it is",
        )
    made = as_change(model, change)
    seeds = [derive(seed, "landscape", i) for i in range(probes)]

    def around(net: nn.Module) -> dict[str, Any]:
        parameters = {n: p for n, p in net.named_parameters() if p.is_floating_point()}
        size = grain(sum(p.numel() for p in parameters.values()))

        def at(terms: list[tuple[int, float]]) -> float:
            with torch.no_grad(), Shift(parameters, terms, grain=size):
                if reward is None:
                    return _right(net, batches)
                return sum(float(reward(net, batch)) for batch in batches) / len(batches)

        return _gains(at([]), torch.tensor([at([(s, sigma)]) for s in seeds], dtype=torch.float64), best, top)

    base, after = made.both(around)
    losses = made.grafts[0].card.get("losses", []) if len(made.grafts) == 1 else []
    course = peaked([-x for x in losses]) if len(losses) >= 2 * WINDOWS else None
    return {"sigma": sigma, "base": base, "changed": after, "course": course}


def _gains(here: float, there: Tensor, best: Sequence[int], top: float) -> dict[str, Any]:
    if here > top:
        raise RunError(f"a reward of {here}, above the best possible {top}; pass top=")
    gain = {str(n): (_best_of(there, n) - here) / (top - here) for n in best} if here < top else None
    better = float((there > here).double().mean())
    return {"reward": here, "rewards": there.tolist(), "better": better, "gain": gain}


def _best_of(rewards: Tensor, n: int) -> float:
    """Return the mean of the best of n rewards drawn with replacement."""
    ranks = torch.arange(len(rewards) + 1, dtype=torch.float64) / len(rewards)
    return float((rewards.sort().values * ranks.pow(n).diff()).sum())


def peaked(rewards: Sequence[float], *, windows: int = WINDOWS) -> dict[str, Any]:
    """Say whether a course of rewards rose, peaked and fell, by the means of equal windows.

    Args:
        rewards: one a step.
        windows: into how many the steps are cut.

    Returns:
        `peak` (the best window's middle step), `rise` and `fall` (from the first window to it, from it to the last),
        `noise` (standard error of such a difference) and `decays`: both are above three times the noise.

    Raises:
        RequestError: fewer than two steps a window.

    Example:
        >>> found = peaked([*range(40), *range(40, 0, -1)], windows=8)
        >>> found["peak"], found["decays"]
        (45, True)
        >>> peaked(list(range(80)), windows=8)["decays"]
        False
    """
    size = len(rewards) // windows
    if size < 2:
        raise RequestError(
            f"a course of {len(rewards)} steps in {windows} windows",
            expected="at least two steps a window",
            do="train longer, or ask for fewer windows",
        )
    values = torch.tensor(rewards[: size * windows], dtype=torch.float64).view(windows, size)
    means, steps = values.mean(1), values.diff(dim=1)
    # Differences of neighbours see the noise and not the trend.
    noise = float((steps.var() / size).sqrt())
    best = int(means.argmax())
    rise, fall = float(means[best] - means[0]), float(means[best] - means[-1])
    found: dict[str, Any] = {"peak": best * size + size // 2, "rise": rise, "fall": fall, "noise": noise}
    return {**found, "decays": min(rise, fall) > 3 * noise}


def _right(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the share of labelled places whose label is the likeliest."""
    right = places = 0
    for batch in batches:
        one = scored(model, batch)
        right, places = right + int(one.right.sum()), places + len(one.labels)
    return right / max(1, places)
