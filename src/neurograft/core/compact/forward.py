"""Optimizers that need no gradient: they ask for losses under seeded shifts, and their whole history is a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.replay import Log
from neurograft.core.numerics.noise import Stream, device_kind, grain
from neurograft.core.seeds import derive

Ask = Callable[[Sequence[tuple[int, float]]], float]


class ForwardOnly(torch.optim.Optimizer):
    """Moves along random directions: theta <- keep * theta - lr * sum over n of pull[n] * z(seed[n]).

    A loop calls `probe` for every batch of an accumulation window and then `step`; nothing is differentiated.

    Args:
        groups: parameter groups of one tensor each, with its `name`; `lr` and `weight_decay` as in `torch.optim`.
            A tensor that asks for no gradient sleeps: it is neither shifted nor moved.
        lr: learning rate.
        weight_decay: share of a number taken off in a step, times the learning rate.
        directions: how many seeds a step draws.
        scales: the shifts at which each direction is looked at.
        pull: losses [directions, scales], float64, -> what each direction is worth, [directions].
        seed: root of the directions' seeds.

    Raises:
        RequestError: groups without names.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        directions: int,
        scales: Sequence[float],
        pull: Callable[[Tensor], Tensor],
        seed: int = 0,
    ) -> None:
        given = list(groups)
        if any(not isinstance(g, dict) or "name" not in g or len(list(g["params"])) != 1 for g in given):
            raise RequestError(
                "parameter groups without names for an optimizer that draws noise by name",
                expected="one group a tensor: {'params': [tensor], 'name': name}",
                do="groups_of(mount.named_parameters(), apart=True), as ng.tune does",
            )
        if directions < 1:
            raise RequestError(f"{directions} directions a step", expected="at least 1", do="give a positive number")
        self.directions, self.scales, self.pull, self.seed = directions, tuple(scales), pull, seed
        self.seeds: list[list[int]] = []
        self.pulls: list[list[float]] = []
        self.rates: list[list[tuple[float, float]]] = []  # by track: (rate, keep) of every step
        self.losses = torch.zeros(directions, len(self.scales), dtype=torch.float64)
        super().__init__(given, {"lr": lr, "weight_decay": weight_decay})
        held = self.named()
        self.track, self.rates = dict.fromkeys(held, 0), [[]]
        self.grain = grain(sum(p.numel() for p in held.values()))
        self.made = {"torch": torch.__version__, "device": device_kind(next(iter(held.values())).device)}

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {g["name"]: g["params"][0] for g in self.param_groups}

    def awake(self) -> dict[str, Tensor]:
        """Return the tensors that are shifted and moved in this step."""
        return {n: p for n, p in self.named().items() if p.requires_grad}

    def now(self) -> list[int]:
        """Return the seeds of the step in progress."""
        return [derive(self.seed, "direction", len(self.seeds), i) for i in range(self.directions)]

    @torch.no_grad()
    def probe(self, ask: Ask) -> float:
        """Look at one batch from every side and return the mean of the losses.

        Args:
            ask: terms (seed, scale) -> loss of the batch where the awake tensors are shifted by their sum.
        """
        found = torch.tensor([[ask([(s, scale)]) for scale in self.scales] for s in self.now()], dtype=torch.float64)
        self.losses += found
        return float(found.mean())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move by what the probes since the last step say, and note it in the log.

        Raises:
            RequestError: a closure, whose gradients nobody would look at.
            RunError: the losses give no finite step.
        """
        if closure is not None:
            raise RequestError("a closure", expected="probe(ask), then step()", do="see ForwardOnly")
        seeds, pulls = self.now(), self.pull(self.losses).tolist()
        if any(p != p or abs(p) == float("inf") for p in pulls):
            raise RunError(
                f"the losses {self.losses.tolist()} give no finite step; lower the learning rate or the shift"
            )
        awake, told = self.awake(), {}
        for group in self.param_groups:
            lr, name = float(group["lr"]), group["name"]
            told[name] = (lr, 1.0 - lr * group["weight_decay"]) if name in awake else (0.0, 1.0)
        self.seeds.append(seeds)
        self.pulls.append(pulls)
        self._note(told)
        for name, tensor in awake.items():
            rate, keep = told[name]
            flat = tensor.detach().reshape(-1)  # a copy where it lies in another order, as convolutions may
            Stream(name, tuple(tensor.shape), self.grain).advance_(
                flat, [(s, -rate * p) for s, p in zip(seeds, pulls)] if rate else [], keep=keep
            )
            if not tensor.is_contiguous():
                tensor.copy_(flat.view_as(tensor))
        self.losses.zero_()

    def _note(self, told: dict[str, tuple[float, float]]) -> None:
        """Write the rates down by track; tensors whose rates part get tracks of their own."""
        for number in range(len(self.rates)):
            members = [n for n, t in self.track.items() if t == number]
            first, *others = dict.fromkeys(told[n] for n in members)
            for other in others:
                self.track |= {n: len(self.rates) for n in members if told[n] == other}
                self.rates.append([*self.rates[number], other])
            self.rates[number].append(first)

    def log(self) -> Log:
        """Return what has been done so far."""
        both = torch.tensor(self.rates, dtype=torch.float64).reshape(len(self.rates), -1, 2)
        rates, keeps = (_short(both[..., i].t().contiguous()) for i in range(2))
        shape = (len(self.seeds), self.directions)
        seeds = torch.tensor(self.seeds, dtype=torch.int64).reshape(shape)
        return Log(
            seeds, torch.tensor(self.pulls, dtype=torch.float64).reshape(shape), rates, keeps, self.grain, self.made
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the groups and the log."""
        found: dict[str, Any] = super().state_dict()
        return found | {"log": {"seeds": self.seeds, "pulls": self.pulls, "rates": self.rates, "track": self.track}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a log ended."""
        log = state_dict["log"]
        self.seeds, self.pulls, self.track = (
            [list(s) for s in log["seeds"]],
            [*map(list, log["pulls"])],
            dict(log["track"]),
        )
        self.rates = [[(float(r), float(k)) for r, k in track] for track in log["rates"]]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "log"})


def _short(values: Tensor) -> Tensor:
    """Return [T, K] as [1, K] if nothing changes over the steps."""
    return values[:1].clone() if len(values) and bool((values == values[:1]).all()) else values
