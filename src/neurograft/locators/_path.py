"""The straight way from a baseline to the activations, and its quadrature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from neurograft.core.context import Batch, Context
from neurograft.core.errors import RequestError
from neurograft.core.prompts.examples import size
from neurograft.core.taps.look import look
from neurograft.core.taps.tap import change, gradients
from neurograft.core.units import Site
from neurograft.locators._common import backward, effect, per_example


def quadrature(steps: int, rule: str) -> list[tuple[float, float]]:
    """Return (point, weight) pairs on [0, 1].

    Example:
        >>> quadrature(2, "midpoint"), quadrature(2, "right")
        ([(0.25, 0.5), (0.75, 0.5)], [(0.5, 0.5), (1.0, 0.5)])
    """
    if rule == "midpoint":
        return [((i + 0.5) / steps, 1 / steps) for i in range(steps)]
    if rule == "right":
        return [((i + 1) / steps, 1 / steps) for i in range(steps)]
    last = max(1, steps - 1)
    if rule == "inclusive":
        return [(i / last, 1 / steps) for i in range(steps)]
    return [(i / last, (0.5 if i in (0, last) else 1.0) / last) for i in range(steps)]


class Path:
    """The way from baseline to activation for one batch; `found` holds [examples, n] for each site.

    Args:
        context: the model, what counts and what is attributed.
        sites: what moves together.
        base: site name -> where the way begins, [n], or [..., n] shaped like the activations; 0 where absent.
        batch: the examples.
        multiply: multiply gradients with the way.
        everywhere: move every position, not those alone that count.
    """

    def __init__(
        self,
        context: Context,
        sites: Mapping[str, Site],
        base: Mapping[str, Tensor],
        batch: Batch,
        multiply: bool,
        everywhere: bool = False,
    ) -> None:
        self.context, self.sites, self.base, self.batch = context, sites, base, batch
        self.multiply, self.everywhere, self.examples = multiply, everywhere, size(batch)
        self.found = {n: torch.zeros(self.examples, s.n) for n, s in sites.items()}
        # A module that several layers share is met several times in a pass, and in reverse on the way back.
        self.way: dict[str, list[Tensor]] = {n: [] for n in sites}

    @contextmanager
    def at(self, m: float, *, keep: bool) -> Iterator[None]:
        """Put activations at b + m (a - b), where they count, for a block."""

        def move(name: str, x: Tensor) -> Tensor | None:
            assert watch.seen is not None
            if watch.seen.astray(name):
                return None
            base = self.base[name].to(x).expand_as(x) if name in self.base else torch.zeros_like(x)
            if keep and self.multiply:
                self.way[name].append((x - base).detach())
            moved = base + m * (x - base)
            kept = watch.seen.mask("all" if self.everywhere else self.context.positions)
            if kept is None:
                return moved
            return torch.where(kept.reshape(*kept.shape, *[1] * (x.dim() - kept.dim())), moved, x)

        with change(self.context.model, self.sites, move) as watch:
            yield

    def step(self, m: float, weight: float) -> None:
        """Add one point of the path."""

        def read(name: str, x: Tensor, g: Tensor, rows: Tensor) -> None:
            way = self.way[name].pop().reshape(g.shape) if self.multiply else None
            self.found[name] += weight * per_example(effect(g, way), rows, self.examples).cpu()

        with self.at(m, keep=True), gradients(self.context.model, self.sites, read, mask=self.context.positions):
            backward(self.context.scalar(self.batch))

    def value(self, m: float) -> float:
        """Return F at a point of the path."""
        with torch.no_grad(), self.at(m, keep=False):
            return float(self.context.scalar(self.batch))


def of_token(context: Context, sites: Mapping[str, Site], batch: Batch, token: int) -> dict[str, Tensor]:
    """Return the activations of every site when every token of a batch is `token`, shaped as in the model.

    Raises:
        RequestError: the batch has no tokens, or layers share a site's module.
    """
    if "input_ids" not in batch:
        raise RequestError("baseline='token' for data without tokens", expected="input_ids", do="use baseline='zero'")
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        if name in found:
            raise RequestError(
                f"baseline='token' at {name!r}, which is met several times in a pass",
                expected="sites met once",
                do="use baseline='zero'",
            )
        found[name] = x.detach().clone()

    blank = {**batch, "input_ids": torch.full_like(batch["input_ids"], token)}
    with torch.no_grad(), change(context.model, sites, keep):
        look(context.model, blank)
    return found
