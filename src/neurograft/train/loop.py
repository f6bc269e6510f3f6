"""A small training loop for worlds, demonstrations and rehearsals: no Trainer, the same laws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from neurograft.core.choose import choose
from neurograft.core.compact.mount import Mount
from neurograft.core.context import IGNORE, Batch, Phase, Step, shifts
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.prompts.passing import examples
from neurograft.core.seeds import derive, generator
from neurograft.core.selection import Selection
from neurograft.train.asked import Asked
from neurograft.train.conductor import Conductor
from neurograft.train.moved import Witness
from neurograft.train.optimizers import built, chosen, decaying, forward_only, groups_of
from neurograft.train.steps import differentiable, driven, probed, reference_of
from neurograft.train.untouched import averaging, random_state

Feed = Callable[[int, Phase], Batch]
DECAYS = ("constant", "linear")


def fit(
    mount: Mount,
    batches: Sequence[Batch] | Feed,
    *,
    steps: int,
    lr: float = 1e-3,
    objective: Any = "auto",
    anchor: Any = None,
    optimizer: Any = "AdamW",
    schedule: Any = None,
    reselect: Callable[[nn.Module, int], Selection] | None = None,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    warmup: int = 0,
    decay: str = "constant",
    max_norm: float | None = 1.0,
    evaluate: Callable[[int], None] | None = None,
    call: Callable[..., Any] | None = None,
    seed: int = 0,
) -> list[float]:
    """Train what a mount holds and return the loss of every step.

    Args:
        mount: what is trained.
        batches: collated batches on the model's device, every round in its own order; or a callable
            (draw, phase) -> batch, asked for one batch after the other, for data that depend on the schedule's stage.
        steps: optimizer steps.
        lr: learning rate.
        objective: a choice of `objectives`, or a callable (model, batch) -> loss (a plain number for gradient-free
            optimizers; less is better).
        anchor: see `Asked.of`; its `data` are batches.
        optimizer: a name of `torch.optim` or a choice of `optimizers`; gradient-free ones take any objective.
        schedule: a choice of `schedules`.
        reselect: (model, step) -> Selection, for schedules that turn to other units.
        weight_decay: of matrices, as in the Trainer.
        accumulate: batches a step.
        warmup: steps over which the rate rises linearly.
        decay: "constant" or "linear" to 0 after the warm-up.
        max_norm: gradients are clipped to it; None for no clipping.
        evaluate: called with the number of steps made, after each.
        call: what to call instead of the model, if it is wrapped (compiled, DDP).
        seed: names the order and dropout; the global random state is put back.

    Raises:
        RequestError: no batches.
        RunError: a loss that is not finite, or a tensor that did not move.
    """
    if (not callable(batches) and not batches) or steps < 1:
        raise RequestError(
            f"{'no' if not batches else 'some'} batches and {steps} steps",
            expected="at least one of each",
            do="give data and steps",
        )
    one_of(decay, DECAYS, what="decay")
    asked = Asked.of(objective, anchor, seed=seed)
    witness, feed = Witness(mount), batches if callable(batches) else _ordered(batches, seed)
    conductor = Conductor(schedule, mount, freeze=call is None, reselect=reselect, witness=witness, seed=seed)
    apart = conductor.schedule is not None or forward_only(chosen(optimizer))
    moving = _built(mount, optimizer, apart=apart, weight_decay=weight_decay, lr=lr, seed=seed)
    with _training(mount.model, conductor, seed):
        moving.zero_grad(set_to_none=True)  # of a training that failed, or the caller's
        for step in range(steps):
            for group in moving.param_groups:
                group["lr"] = group["initial_lr"] * _factor(step, steps, warmup, decay)
            phase = conductor.begin(step, moving)
            window = [feed(step * accumulate + i, phase) for i in range(accumulate)]
            loss, reached = _window(mount, asked, window, step, steps, call)
            witness.losses.append(witness.loss(loss, step=step + 1))
            witness.gradients(phase.awake, reached)
            _move(mount, conductor, moving, max_norm)
            if evaluate is not None:
                evaluate(step + 1)
    witness.check()
    return witness.losses


def _built(mount: Mount, optimizer: Any, *, apart: bool, weight_decay: float, lr: float, seed: int) -> Any:
    """Return the optimizer of what a mount holds; its groups remember the rate they begin with."""
    decay = decaying(mount.model, mount)
    groups = groups_of(mount.named_parameters(), decay=decay, weight_decay=weight_decay, apart=apart)
    moving = built(chosen(optimizer), groups, lr=lr, seed=seed)
    driven(mount, moving)
    for group in moving.param_groups:
        group["initial_lr"] = group["lr"]
    return moving


@contextmanager
def _training(model: nn.Module, conductor: Conductor, seed: int) -> Iterator[None]:
    """Put the model into training mode and seed its dropout; modes, random state and sleepers are put back.

    Layers that keep statistics of batches stay in evaluation mode: these belong to the base.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.train()
    for module in averaging(model):
        module.eval()
    try:
        with random_state():
            torch.manual_seed(derive(seed, "dropout"))
            yield
    finally:
        conductor.end()
        for module, mode in modes:
            module.training = mode


def _move(mount: Mount, conductor: Conductor, moving: Any, max_norm: float | None) -> None:
    """Take one optimizer step with the gradients that are there."""
    conductor.before_step(moving)
    if max_norm is not None:
        nn.utils.clip_grad_norm_([p for p in mount.parameters() if p.grad is not None], max_norm)
    moving.step()
    conductor.after_step(moving)
    mount.write()
    moving.zero_grad(set_to_none=True)


def _window(
    mount: Mount, asked: Asked, window: Sequence[Batch], step: int, steps: int, call: Callable[..., Any] | None
) -> tuple[float, set[str]]:
    """Go through an accumulation window; return its loss, and what a gradient-free optimizer reached."""
    labels = [b.get("labels") for b in window]
    shift = shifts(mount.model)
    items = None
    if all(isinstance(v, torch.Tensor) for v in labels):
        items = sum(int((v[..., 1:] if shift else v).ne(IGNORE).sum()) for v in labels if v is not None)
    total, reached, rows = 0.0, set[str](), sum(map(examples, window))
    for i, batch in enumerate(window):

        def share(i: int = i, batch: Batch = batch) -> torch.Tensor:
            at = Step(
                mount.model, batch, step, steps, items, reference_of(mount),
                wrapped=call, trained=mount.held, rows=rows or None,
            )  # fmt: skip
            return asked.loss(at, windows=len(window), draw=step * len(window) + i)

        if mount.driver is not None:
            loss, seen = probed(mount, share)
            total, reached = total + loss, reached | seen
        else:
            found = differentiable(share())
            found.backward()
            total += float(found.detach())
    return total, reached


def _ordered(batches: Sequence[Batch], seed: int) -> Feed:
    def feed(draw: int, phase: Phase) -> Batch:
        around, place = divmod(draw, len(batches))
        order = torch.randperm(len(batches), generator=generator(seed, "order", around))
        return batches[int(order[place])]

    return feed


def _factor(step: int, steps: int, warmup: int, decay: str) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if decay == "constant" else (steps - step) / max(1, steps - warmup)


def rehearsal(
    model: nn.Module, batches: Sequence[Batch], *, adapter: Any = "slice", **options: Any
) -> Callable[[Selection | None], Graft]:
    """Return what trains a selection for a short while and gives the graft: `Context.rehearse`.

    Args:
        model: the model; left as found.
        batches: collated batches.
        adapter: a choice of `adapters`; "dense" if the selection is None.
        **options: those of `fit`.
    """

    def rehearse(where: Selection | None, **more: Any) -> Graft:
        made = choose("adapters", "dense" if where is None else adapter)
        with made(model, where) as mount:
            losses = fit(mount, batches, **{**options, **more})
            graft: Graft = mount.graft(card={"losses": losses})
        return graft

    return rehearse
