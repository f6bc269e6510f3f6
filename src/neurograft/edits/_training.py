"""Fine-tuning of one matrix on edit requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neurograft.core.asking import asking
from neurograft.core.context import Context, device_of, unlabelled
from neurograft.core.grafts.coordinates import coordinates, everything
from neurograft.core.grafts.delta import Delta, Slice
from neurograft.core.grafts.stack import Stack
from neurograft.core.prompts.requests import Request, joined
from neurograft.core.region import as_matrix
from neurograft.core.units import Parameters
from neurograft.edits._values import finite, per_row


class Training:
    """Fine-tuning of one matrix, taken back afterwards."""

    def __init__(
        self, context: Context, order: str, lr: float, epochs: int, together: int, enough: float, eos: bool
    ) -> None:
        self.context, self.model, self.order = context, context.model, order
        self.lr, self.epochs, self.together, self.enough, self.eos = lr, epochs, together, enough, eos
        self.start = self.now = torch.empty(0)

    @contextmanager
    def at(self, name: str) -> Iterator[nn.Parameter]:
        """Make one parameter trainable and put everything back afterwards, bit for bit."""
        weight = Parameters.of(self.model).by_name[name]
        kept = weight.detach().clone()
        try:
            with asking(self.model, [weight]), torch.enable_grad():
                self.start = self.now = kept.float()
                yield weight
        finally:
            with torch.no_grad():
                weight.copy_(kept)
            weight.grad = None

    def fit(self, weight: nn.Parameter, requests: Sequence[Request]) -> list[float]:
        """Train and return the mean loss of every epoch."""
        if self.order == "breadth":
            return self.converge(weight, requests, 0)
        return [loss for i, one in enumerate(requests) for loss in self.converge(weight, [one], i)[-1:]]

    def converge(self, weight: nn.Parameter, requests: Sequence[Request], turn: int) -> list[float]:
        """Pass over the requests in batches until the mean loss is small enough; return the epochs' losses."""
        self.now = master = self.now.clone()  # steps smaller than the weight's own rounding add up here
        optimizer, losses = torch.optim.Adam([master], lr=self.lr), []
        for epoch in range(self.epochs):
            rng = self.context.generator("locft_bf", turn, epoch)
            shuffled = [requests[i] for i in torch.randperm(len(requests), generator=rng).tolist()]
            total = 0.0
            for i in range(0, len(shuffled), self.together):
                batch = shuffled[i : i + self.together]
                loss, gradient = self.traced(weight, batch)
                finite(loss)
                total += float(loss.detach()) * len(batch)
                if float(loss.detach()) < self.enough:
                    continue
                master.grad = gradient()
                optimizer.step()
                with torch.no_grad():
                    weight.copy_(self.laid(master))
            losses.append(total / len(requests))
            if losses[-1] < self.enough:
                break
        return losses

    def traced(self, weight: nn.Parameter, batch: Sequence[Request]) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return the loss of a batch, and what returns its gradient by what is trained."""
        loss = self.loss(batch)
        return loss, lambda: torch.autograd.grad(loss, [weight])[0].float()

    def laid(self, master: Tensor) -> Tensor:
        """Return the matrix that what is trained makes."""
        return master

    def loss(self, batch: Sequence[Request]) -> Tensor:
        """Return the mean over requests of the mean over their targets' tokens."""
        rows = joined(batch, eos=self.eos, device=device_of(self.model))
        logits = self.model(**unlabelled(rows.batch)).logits
        return rows.mean(per_row(logits, rows), len(batch)).mean()

    def tried(self, name: str, requests: Sequence[Request]) -> float:
        """Return how likely requests become when learned at a place, times the share of general predictions kept."""
        before = self.general()
        with self.at(name) as weight:
            self.fit(weight, requests)
            with torch.no_grad():
                learned = self.likely(requests)
                stays = float((self.general() == before).float().mean()) if len(before) else 1.0
        return learned * stays

    def likely(self, requests: Sequence[Request]) -> float:
        """Return the mean over requests of exp of the mean log-probability of their targets' tokens."""
        return sum(float((-self.loss([r])).exp()) for r in requests) / len(requests)

    @torch.no_grad()
    def general(self) -> Tensor:
        """Return the likeliest next token at every labelled, or else every real, position of the general data."""
        found = []
        for batch in self.context.batches:
            says = self.model(**unlabelled(batch)).logits.argmax(-1)
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            found.append(says[real])
        return torch.cat(found) if found else torch.empty(0)

    def deltas(self, name: str) -> dict[str, Delta]:
        """Return the trained matrix by checkpoint tensor, as a change of the base, whatever else lies on it."""
        weight, stack, where = Parameters.of(self.model).by_name[name], Stack.of(self.model), coordinates(self.model)
        shape = tuple(weight.shape)
        region = everything(shape, as_matrix(shape))
        values = self.now.cpu()
        if name in stack.ledgers:
            values = stack.original(name, weight, region).float().reshape(shape) + (values - self.start.cpu())
        pieces = where.to_checkpoint(name, region)
        return {p.name: Slice(p.region, p.take(values.reshape(region.values_shape))) for p in pieces}
