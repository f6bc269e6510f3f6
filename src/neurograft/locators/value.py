"""Which channels carry a model's estimate of its own success, or the error of that estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import IGNORE, Batch, Context, token_mask
from neurograft.core.errors import RequestError, one_of
from neurograft.core.prompts.examples import size
from neurograft.core.selection import Scores
from neurograft.core.taps.look import look
from neurograft.core.taps.table import auroc
from neurograft.core.taps.tap import per_unit, watch
from neurograft.locators._common import need_two_sets, scored
from neurograft.locators._value import Value, errors, fitted

OF, PROBES = ("value", "dopamine"), ("mlp", "linear")
HELD = 5  # one rollout in so many is left out of the fit, and its outcome asked of V(s_0)


@method(
    paper="sparse-reward",
    kinds={"channel"},
    needs={"batches", "contrast", "labels", "taps", "per_token"},
    claims={"finite", "length"},
    departs="Inferred: the squared TD error, its optimiser, and that dopamine channels are ranked by a second probe of "
    "the step's error read from the state the step leads to. Channels are standardised first, since a column's norm "
    "depends on its input's scale; weight decay on the first layer lets channels that tell nothing fall to 0, without "
    "which an MLP ranks by the noise it remembers.",
)
def value(
    context: Context,
    *,
    of: str = "value",
    probe: str = "mlp",
    hidden: int = 1024,
    gamma: float = 1 - 1e-5,
    epochs: int = 300,
    lr: float = 1e-3,
    decay: float = 1e-2,
    ends: Sequence[int] = (),
) -> Scores:
    """Score each channel by the L1 norm of its column in a probe of the reward to come, a probe for each site.

    `context.batches` are rollouts with reward 1, `context.contrast` with reward 0. The states of a rollout s_0 ... s_T
    stand at the last token of the prompt and at the answer's tokens. V(s) = sigmoid(w2 . relu(W1 s)), or
    sigmoid(w . s), is fitted to r at s_T and to gamma * V(s_{t+1}), held constant, before it. "dopamine" then fits a
    second probe, without the sigmoid, to gamma * V(s_{t+1}) - V(s_t) at s_{t+1}. One rollout in five is left out of the
    first fit; how well V(s_0) tells their outcomes, with all channels and with the best few alone, is in the card.

    Args:
        context: model, sites with taps (units="channel", at="residual"), labelled batches and contrast.
        of: the "value", or the "dopamine": its prediction errors.
        probe: "mlp", or "linear", ranked by |w|.
        hidden: width of the MLP.
        gamma: discount.
        epochs: full-batch steps of Adam.
        lr: their size.
        decay: weight decay of the first layer.
        ends: token ids that end a reasoning step, so that states stand there (and at s_0, s_T) alone; empty for every
            token of the answer.

    Raises:
        RequestError: one set of rollouts, rows without answers, or rollouts of one state for "dopamine".
    """
    one_of(of, OF, what="of")
    one_of(probe, PROBES, what="probe")
    states, rewards, following = rollouts(context, ends)
    how: dict[str, Any] = {"gamma": gamma, "epochs": epochs, "lr": lr, "decay": decay}
    how["hidden"] = hidden if probe == "mlp" else 0
    scores, told = {}, {}
    first = torch.cat([torch.ones(1, dtype=torch.bool), following[:-1] < 0])
    target = torch.where(following < 0, rewards, torch.zeros(()))
    # One in five of either side, counted apart, so that both are asked about whatever their numbers.
    good = rewards > 0.5
    number = torch.where(good, (first & good).cumsum(0), (first & ~good).cumsum(0)) - 1
    many = min(int((first & good).sum()), int((first & ~good).sum())) >= HELD
    held = number % HELD == HELD - 1 if many else torch.zeros_like(first)
    fit = (~held).nonzero()[:, 0]
    inside = _renumbered(following, fit)
    asked = first & held if bool(held.any()) else first
    for name, x in states.items():
        x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-8)
        found = fitted(x[fit], target[fit], inside, rng=context.generator("value", name), **how)
        told[name] = _kept(found, x[asked], rewards[asked])
        if of == "dopamine":
            delta, after = errors(found(x), following, gamma)
            if not len(delta):
                raise RequestError(
                    "rollouts of one state each", expected="several steps", do="give longer answers, or other ends="
                )
            delta = (delta - delta.mean()) / delta.std(correction=0).clamp(min=1e-8)
            found = fitted(x[after], delta, None, rng=context.generator("dopamine", name), **how)
        scores[name] = found.importance()
    return scored(context, scores, {"auroc": told, "states": len(rewards), "rollouts": int(first.sum())})


def _renumbered(following: Tensor, keep: Tensor) -> Tensor:
    """Return the next state's number among the states kept, which are whole rollouts."""
    place = torch.full((len(following) + 1,), -1)
    place[keep] = torch.arange(len(keep))
    return place[following[keep]]


def _kept(found: Value, x: Tensor, outcome: Tensor) -> dict[str, float]:
    """Return the AUROC of V(s_0) with all channels and with the best of them alone."""
    order = found.importance().argsort(descending=True, stable=True)
    n = len(order)
    counts = sorted({n, max(1, n // 10), max(1, n // 100), 1}, reverse=True)
    return {str(k): auroc(found(x, order[:k]), outcome) for k in counts}


def rollouts(context: Context, ends: Sequence[int]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return states [M, n] for each site, each state's reward to come [M], and the number of the next state [M]."""
    need_two_sets(context, came="one set of rollouts", expected="successful and failed ones")
    pieces: dict[str, list[Tensor]] = {name: [] for name in context.sites}
    numbers: list[Tensor] = []
    rewards: list[Tensor] = []
    lead, seen = next(iter(context.sites)), 0

    def read(name: str, x: Tensor) -> None:
        x = per_unit(x)
        pieces[name].append(x.float().cpu())
        if name == lead:
            numbers.append(looking.place()[0] + seen)

    with watch(context.model, context.sites, read, mask=_path(tuple(ends))) as looking, torch.no_grad():
        for side, reward in ((context.batches, 1.0), (context.contrast, 0.0)):
            for batch in side:
                look(context.model, batch)
                seen += size(batch)
                rewards.append(torch.full((size(batch),), reward))
    which = torch.cat(numbers)
    following = torch.where(which[1:] == which[:-1], torch.arange(1, len(which)), -1)
    return (
        {name: torch.cat(rows) for name, rows in pieces.items()},
        torch.cat(rewards)[which],
        torch.cat([following, torch.tensor([-1])]),
    )


def _path(ends: tuple[int, ...]) -> Callable[[Batch], Tensor]:
    """Return where states stand: the token before the answer, its last one, and those between that end a step."""

    def path(batch: Batch) -> Tensor:
        real = token_mask(batch)
        labels = batch.get("labels")
        if real is None or labels is None or tuple(labels.shape) != tuple(real.shape):
            raise RequestError(
                "rollouts without labelled answers", expected="labels [B, T]", do="give prompt/completion rows"
            )
        answer = (labels != IGNORE) & real
        index = torch.arange(answer.shape[1], device=answer.device)
        first = torch.where(answer, index, answer.shape[1]).amin(1, keepdim=True)
        last = torch.where(answer, index, -1).amax(1, keepdim=True)
        inside = answer
        if ends:
            inside = answer & torch.isin(batch["input_ids"], torch.tensor(ends, device=answer.device))
        return (inside | (index == first - 1) | (index == last)) & real

    return path
