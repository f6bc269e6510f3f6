"""Fine-tuning of one matrix in which every request has ranks of its own, so that each can be taken out alone.

The keys of a request are what enters the matrix where its answer is predicted. No change of the matrix moves them, and
what its loss asks of the matrix at these places is a sum of vectors times keys. Shape letters: n requests, q keys of
all of them, r rows (prompts), t positions, i inputs and o outputs of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE, device_of
from neurograft.core.grafts.delta import Delta, LowRank
from neurograft.core.linears import transposed
from neurograft.core.prompts.requests import Request, Rows, joined
from neurograft.core.taps.tap import change
from neurograft.core.units import Parameters, Site, Tap
from neurograft.edits._memory import read, tensor_of
from neurograft.edits._training import Training


class Separate(Training):
    """W + sum over requests of B_i A_i, A_i fixed: the request's keys a, each as a |a|_1 / |a|_2^2; B_i is trained.

    Each B_i follows the loss of its own request, the parts of the others in place. Scaled so, a first step of Adam on
    B_i moves what leaves the matrix at a key as far as a step of Adam on the whole matrix does.
    """

    spans: dict[int, slice]
    keys: Tensor
    sites: dict[str, Site]
    transposed: bool

    def fit(self, weight: nn.Parameter, requests: Sequence[Request]) -> list[float]:
        """Read the requests' keys, train their parts, and return the mean loss of every epoch."""
        module = next(n.rpartition(".")[0] for n, p in self.model.named_parameters() if p is weight)
        self.transposed = transposed(self.model.get_submodule(module))
        wide, high = weight.shape if self.transposed else tuple(weight.shape)[::-1]
        self.sites = {
            side: Site(f"{module}/{side}", "channel", n, (), Tap(module, side))
            for side, n in (("input", wide), ("output", high))
        }
        self.keys, counts = self._keys(requests)
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.spans = {id(r): slice(end - count, end) for r, end, count in zip(requests, ends, counts)}
        self.now = torch.zeros(high, len(self.keys), device=weight.device)
        return super().fit(weight, requests)

    def _keys(self, requests: Sequence[Request]) -> tuple[Tensor, list[int]]:
        """Return the scaled keys, [q, i], and how many each request has."""
        rows = joined(requests, eos=self.eos, device=device_of(self.model))
        flags = torch.zeros_like(rows.batch["labels"], dtype=torch.bool)
        flags[:, :-1] = rows.batch["labels"][:, 1:] != IGNORE
        found: list[Tensor] = []
        read(self.model, {"in": self.sites["input"]}, rows, flags, lambda _, x: found.append(x.float().clone()))
        keys = torch.cat(found)
        size = keys.abs().sum(1, keepdim=True) / keys.pow(2).sum(1, keepdim=True).clamp_min(1e-12)
        counts = torch.zeros(len(requests), dtype=torch.int64, device=flags.device)
        return keys * size, counts.index_add(0, rows.owner, flags.sum(1)).tolist()

    def traced(self, weight: nn.Parameter, batch: Sequence[Request]) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return the loss of a batch, and what returns each part's gradient by its own request's share of it."""
        seen: dict[str, Tensor] = {}

        def tell(name: str, x: Tensor) -> Tensor | None:
            if name == "input":
                seen[name] = x.detach()
                return None
            seen[name] = torch.zeros_like(x, requires_grad=True)
            return x + seen[name]

        with change(self.model, self.sites, tell):
            loss = self.loss(batch)
        rows = joined(batch, eos=self.eos, device=device_of(self.model))
        return loss, partial(self._pulled, loss, rows, seen, batch)

    def _pulled(self, loss: Tensor, rows: Rows, seen: dict[str, Tensor], batch: Sequence[Request]) -> Tensor:
        (slopes,) = torch.autograd.grad(loss, [seen["output"]])
        of_row = (len(rows.owner), -1)
        slopes, inputs = (x.float().reshape(*of_row, x.shape[-1]) for x in (slopes, seen["input"]))
        found = torch.zeros_like(self.now)
        for i, request in enumerate(batch):
            mine, span = rows.owner == i, self.spans[id(request)]
            found[:, span] = slopes[mine].flatten(0, 1).T @ (inputs[mine].flatten(0, 1) @ self.keys[span].T)
        return found

    def laid(self, master: Tensor) -> Tensor:
        """Return the matrix with all parts on it."""
        product = master @ self.keys
        return self.start + (product.t() if self.transposed else product)

    def deltas(self, name: str) -> dict[str, Delta]:
        """Return the parts by checkpoint tensor, the ranks in the order of the requests."""
        shape = tuple(Parameters.of(self.model).by_name[name].shape)
        a, b = self.keys.cpu(), self.now.detach().cpu()
        return {tensor_of(self.model, name): LowRank(shape, a, b, 1.0, self.transposed)}

    def ranks(self, requests: Sequence[Request]) -> list[int]:
        """Return how many ranks each request has."""
        return [span.stop - span.start for span in (self.spans[id(r)] for r in requests)]
