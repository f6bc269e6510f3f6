"""Any optimizer, let loose at each step on the numbers with the largest gradients alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.compact.moments import carried
from neurograft.core.errors import RequestError, near, one_of

IDS = "ids"


@method(
    paper="gmt",
    departs="The paper's formula is written for plain gradient steps, where both semantics agree. No official code was "
    "found. The gradient is that of the whole accumulation window, after clipping.",
)
class gradient_masked(torch.optim.Optimizer):
    """Step the `keep` share of numbers with the largest |gradient|, chosen anew at each step; ties by place.

    Args:
        groups: parameter groups.
        keep: share that moves, of each tensor or of all together; at 1 it is the optimizer inside, bit for bit.
        scope: "tensor", at least one number of each, or "global", which may leave whole tensors out.
        strict: True: numbers outside of the mask are not moved, neither by moments nor by weight decay, and the state
            is compact, of the mask alone. False: their gradients are set to 0, and the optimizer sees everything.
        moments: with `strict`, at the next mask: "keep" those of numbers in both, or "drop" all.
        of: optimizer of `torch.optim` inside.
        **options: its options: lr, betas, weight_decay, ...

    Raises:
        RequestError: a share outside of (0, 1], or an optimizer that `torch.optim` does not have.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> w.grad = torch.tensor([0.1, -3.0, 0.2, 0.0])
        >>> gradient_masked([{"params": [w]}], keep=0.25, of="SGD", lr=1.0).step()
        >>> w.tolist()
        [1.0, 5.0, 3.0, 4.0]
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        keep: float = 0.2,
        scope: Literal["tensor", "global"] = "tensor",
        strict: bool = True,
        moments: Literal["keep", "drop"] = "keep",
        of: str = "AdamW",
        lr: float = 1e-3,
        **options: Any,
    ) -> None:
        one_of(scope, ("tensor", "global"), what="scope")
        one_of(moments, ("keep", "drop"), what="moments")
        kind = getattr(torch.optim, of, None)
        if not 0 < keep <= 1 or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            raise RequestError(
                f"keep={keep}, of={of!r}",
                expected="a share above 0, at most 1, and a class of torch.optim",
                do=near(of, [n for n in vars(torch.optim) if n[0].isupper()]),
            )
        self.keep, self.scope, self.strict, self.moments, self.kind = keep, scope, strict, moments, kind
        self.options = {"lr": lr, **options}
        given = [dict(g) for g in groups]
        super().__init__(given, dict(kind([nn.Parameter(torch.zeros(1))], **self.options).defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Choose the numbers and step them; return what the closure says, if there is one."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        chosen = self._chosen()
        if self.keep == 1.0 or not self.strict:
            self._whole(chosen)
        else:
            self._compact(chosen)
        return loss

    def _chosen(self) -> dict[nn.Parameter, Tensor]:
        """Return for each tensor with a gradient the sorted numbers of the mask."""
        moving = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        sizes = [p.grad.abs().reshape(-1).float() for p in moving]
        if self.scope == "tensor":
            return {p: _top(s, max(1, int(self.keep * len(s) + 0.5))) for p, s in zip(moving, sizes)}
        total = sum(len(s) for s in sizes)
        best = _top(torch.cat(sizes), max(1, int(self.keep * total + 0.5)))
        found, first = {}, 0
        for p, s in zip(moving, sizes):
            found[p] = best[(best >= first) & (best < first + len(s))] - first
            first += len(s)
        return found

    def _whole(self, chosen: dict[nn.Parameter, Tensor]) -> None:
        for p, ids in chosen.items():
            if self.keep < 1.0:
                flat = p.grad.reshape(-1)  # type: ignore[union-attr]
                p.grad = torch.zeros_like(flat).index_copy(0, ids, flat[ids]).view_as(p)
        self._inside([{**g, "params": list(g["params"])} for g in self.param_groups], self.state)

    def _compact(self, chosen: dict[nn.Parameter, Tensor]) -> None:
        small: dict[nn.Parameter, nn.Parameter] = {}
        state: dict[Any, Any] = defaultdict(dict)
        for p, ids in chosen.items():
            if not len(ids):
                self.state.pop(p, None)
                continue
            one = nn.Parameter(p.reshape(-1)[ids])
            one.grad = p.grad.reshape(-1)[ids]  # type: ignore[union-attr]
            past = self.state.get(p)
            if past and self.moments == "keep":
                inside = torch.isin(ids, past[IDS]).nonzero().reshape(-1)
                there = torch.searchsorted(past[IDS], ids[inside])
                rest = {k: v for k, v in past.items() if k != IDS}
                state[one] = carried(rest, torch.empty(len(past[IDS])), one, inside, there)
            small[p] = one
        groups = [{**g, "params": [small[p] for p in g["params"] if p in small]} for g in self.param_groups]
        self._inside([g for g in groups if g["params"]], state)
        for p, one in small.items():
            p.put_(chosen[p], one.detach())  # by place in the tensor, whatever its order in memory
            self.state[p] = {IDS: chosen[p], **state.get(one, {})}

    def _inside(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Let the optimizer inside make one step on these groups with this state."""
        if groups:
            inner = self.kind(groups, **self.options)
            inner.state = state
            inner.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's state; numbers of the mask stay whole numbers."""
        super().load_state_dict(state_dict)
        for place, p in enumerate(p for g in self.param_groups for p in g["params"]):
            ids = state_dict["state"].get(place, {}).get(IDS)
            if ids is not None:
                self.state[p][IDS] = ids.to(p.device)


def _top(sizes: Tensor, count: int) -> Tensor:
    found: Tensor = sizes.sort(descending=True, stable=True).indices[:count].sort().values
    return found
