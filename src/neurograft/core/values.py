"""Where a live model keeps its trainable tensors: a child module that adds no key to `state_dict`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RunError
from neurograft.core.live import Live


class LiveValues(nn.Module):
    """Holds the trainable tensors of a model's live weights, under the names of those weights.

    It adds no key to `state_dict`, keeps float32 whatever `.to()` is called with, and copies to nothing.
    The names carry dots, so that weight-decay rules that read names treat a tensor like its owner.
    """

    def __init__(self, lives: list[Live]) -> None:
        super().__init__()
        for live in lives:
            self._parameters[live.name] = live.theta
        self.lives = lives

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiveValues:
        for live in self.lives:
            device = fn(torch.empty(0, device=live.theta.device)).device
            if device.type == "meta":
                raise RunError(f"{live.name} is live; detach before moving the model to the meta device")
            live.theta.data = live.theta.data.to(device)
            live.region, live.original = live.region.to(device), live.original.to(device)
            live.routes.clear()
            live.seen = live.weight._version
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for live in self.lives:
            live.write()  # the base's keys share storage with the weights, so they are current now

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for live in self.lives:
            live.reload()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return nn.Module()

    def __reduce__(self) -> Any:
        raise RunError("a model with live weights cannot be pickled; save the graft, or detach first")


class LiveNormValues(LiveValues, nn.LayerNorm):
    """Trainable tensors whose owners are `nn.LayerNorm`: a LayerNorm too, for rules that ask for the class."""

    def __init__(self, lives: list[Live]) -> None:
        LiveValues.__init__(self, lives)

    def extra_repr(self) -> str:
        """Say how many tensors are held."""
        return f"{len(self.lives)} tensors"
