"""A small dense map among chosen channels of the residual stream: x[..., S] += x[..., S] W^T + b."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.operation import Operation
from neurograft.core.taps.behind import Behind
from neurograft.core.units import Site


def mapped(stream: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return what the map adds to a stream [..., n]: x[..., S] W^T + b at the k channels S, 0 elsewhere.

    Example:
        >>> x = torch.tensor([[1.0, 5.0, 2.0]])
        >>> mapped(x, torch.tensor([0, 2]), torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([0.0, 1.0])).tolist()
        [[2.0, 0.0, 4.0]]
    """
    ids = ids.to(stream.device)
    weight, bias = (t.to(stream.device, stream.dtype) for t in (weight, bias))
    made = stream.index_select(-1, ids) @ weight.mT + bias
    return torch.zeros_like(stream).index_copy(-1, ids, made)


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """A dense map among chosen residual channels; an `Operation` of grafts.

    Args:
        site: channels; its tap is where the stream is added to.
        block: module whose input the tapped contribution is added to; None where the tap carries the stream itself.
        ids: the channels S, int64 [k].
        weight: W, float32 [k, k].
        bias: b, float32 [k].

    Raises:
        RequestError: shapes that do not fit each other or the site, or a site without a tap.
    """

    site: Site
    block: str | None
    ids: Tensor
    weight: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        k = len(self.ids)
        inside = k and int(self.ids.min()) >= 0 and int(self.ids.max()) < self.site.n and len(self.ids.unique()) == k
        shapes = tuple(self.weight.shape) == (k, k) and tuple(self.bias.shape) == (k,)
        if self.site.tap is None or self.site.kind != "channel" or not inside or not shapes:
            raise RequestError(
                f"a map of {k} channels by {tuple(self.weight.shape)} and {tuple(self.bias.shape)} at {self.site.name}",
                expected=f"distinct residual channels of 0 to {self.site.n - 1}, [k, k] and [k]",
                do="make it by adapter='channels'",
            )

    @property
    def scalable(self) -> bool:
        """It has a strength."""
        return True

    def scaled(self, s: float) -> ChannelMap:
        """Return it at strength s: it adds s times as much; itself at 1."""
        return self if s == 1.0 else replace(self, weight=s * self.weight, bias=s * self.bias)

    def meta(self) -> dict[str, Any]:
        """Return plain data."""
        kind = "neurograft.core.channel_map.ChannelMap"
        return {"type": kind, "site": self.site.as_dict(), "block": self.block}

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors."""
        return {"ids": self.ids, "weight": self.weight, "bias": self.bias}

    @staticmethod
    def from_parts(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ChannelMap:
        """Read what `meta` and `tensors` wrote."""
        return ChannelMap(
            Site.from_dict(meta["site"]), meta["block"], **{k: tensors[k] for k in ("ids", "weight", "bias")}
        )

    def mount(self, model: nn.Module) -> Behind:
        """Put it on.

        Raises:
            RequestError: the model has no such module.
        """
        tap, known = self.site.tap, dict(model.named_modules())
        assert tap is not None
        missing = [n for n in (tap.module, self.block) if n is not None and n not in known]
        if missing:
            raise RequestError(
                f"{self.describe()}, for which the module {missing[0]!r} is missing",
                expected="the model it was made on",
                do="load the base named on the graft's card",
            )
        visit = partial(mapped, ids=self.ids, weight=self.weight, bias=self.bias)
        return Behind(model, tap.module, self.block, visit, dim=tap.dim)

    def fold(self, model: nn.Module) -> dict[str, Slice]:
        """Refuse: what it adds depends on the stream, and no weight of the sub-layer sees that."""
        raise RequestError(
            f"{self.describe()}, as a weight change",
            expected="an operation",
            do="keep it as it is; it ships in the graft",
        )

    def clashes(self, other: Operation) -> bool:
        """Say whether both map channels of one stream, so that their order would matter."""
        return isinstance(other, ChannelMap) and self.site.tap == other.site.tap

    def describe(self) -> str:
        """Return a few words for messages."""
        return f"a map among {len(self.ids)} channels at {self.site.name}"
