"""Routers of expert layers that choose again as they chose: a rounding apart, a token would go elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError


@dataclass
class Routing:
    """The routers of one layer.

    Args:
        routers: modules that return (logits, scores [N, k], indices [N, k]).
        last: what they chose last.
    """

    routers: list[nn.Module]
    last: list[Tensor]

    @staticmethod
    def of(feed: nn.Module) -> Routing:
        """Return those of an FFN, none for a dense one.

        Raises:
            RequestError: a layer of experts whose router is not known.
        """
        found = [m for m in feed.modules() if type(m).__name__.endswith("TopKRouter")]
        if not found and any(n.endswith("experts") for n, _ in feed.named_modules()):
            raise RequestError(
                f"a {type(feed).__name__}, whose router is not known",
                expected="a router of transformers' kind: logits, scores and indices",
                do="use a Qwen2-MoE-, OLMoE- or Mixtral-like model",
            )
        return Routing(found, [])

    @contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """Note what the routers choose, in the narrowest type."""
        found: list[Tensor] = []

        def note(module: nn.Module, args: Any, out: Any) -> None:
            logits, _, indices = out
            found.append(indices.to(torch.uint8 if logits.shape[-1] <= 256 else torch.int16))

        with self._hooked(note):
            yield found
        self.last = found

    @contextmanager
    def heard(self) -> Iterator[list[Tensor]]:
        """Gather the logits the routers give, for losses of their own that read them."""
        found: list[Tensor] = []
        with self._hooked(lambda module, args, out: found.append(out[0])):
            yield found

    @contextmanager
    def replayed(self, chosen: list[Tensor]) -> Iterator[None]:
        """Let the routers choose as noted; the scores of the chosen follow what the layer sees now."""
        turn = {id(m): i for i, m in enumerate(self.routers)}

        def choose(module: nn.Module, args: Any, out: Any) -> Any:
            logits, scores, _ = out
            indices = chosen[turn[id(module)]].long()
            probabilities = logits.softmax(-1, dtype=torch.float32)  # as the routers themselves, whatever the logits
            now = probabilities.gather(-1, indices)
            if getattr(module, "norm_topk_prob", True):
                now = now / now.sum(-1, keepdim=True)
            return logits, now.to(scores.dtype), indices

        with self._hooked(choose):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Let them choose as they did last."""
        with self.replayed(self.last):
            yield

    @contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        with ExitStack() as undo:
            for router in self.routers:
                undo.callback(router.register_forward_hook(hook).remove)
            yield
