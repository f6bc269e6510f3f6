"""Where a live model keeps its trainable tensors: a child module that adds no key to `state_dict`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neurograft.core.errors import RunError
from neurograft.core.marks import CHILD, CLAIM


class Entry(Protocol):
    """A trainable tensor and the weight it belongs to."""

    name: str
    theta: nn.Parameter

    def moved(self, device: torch.device) -> None:
        """Follow the model to another device, keeping the dtype."""

    def write(self) -> None:
        """Bring the weight up to date."""

    def reload(self) -> None:
        """Take over what was loaded into the weight."""


class LiveValues(nn.Module):
    """Holds the trainable tensors of a model's live weights, under the names of those weights.

    It adds no key to `state_dict`, keeps float32 whatever `.to()` is called with, and copies to nothing.
    The names carry dots, so that weight-decay rules that read names treat a tensor like its owner.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        nn.Module.__init__(self)  # not super(): below, the next class in line is nn.LayerNorm
        for entry in entries:
            if isinstance(entry.theta, nn.Parameter):  # what was left behind follows the model and is not trained
                self._parameters[entry.name] = entry.theta
        self.entries = entries

    def forward(self, x: Any) -> Any:
        """Return x: a root that runs its children in turn (`nn.Sequential`) runs this one too."""
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiveValues:
        for entry in self.entries:
            device = fn(torch.empty(0, device=entry.theta.device)).device
            if device.type == "meta":
                raise RunError(f"{entry.name} is live; detach before moving the model to the meta device")
            entry.moved(device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for entry in self.entries:
            if not getattr(entry, "resting", False):  # a graft taken inside the block reads the base's state
                entry.write()  # the base's keys share storage with the weights, so they are current now

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for entry in self.entries:
            entry.reload()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return Gone()

    def __reduce__(self) -> Any:
        raise RunError("a model with live weights cannot be pickled; save the graft, or detach first")


class Gone(nn.Identity):
    """What a copy of a live model has in the place of the values: nothing, and it can be attached to."""


class LiveNormValues(LiveValues, nn.LayerNorm):
    """Trainable tensors whose owners are `nn.LayerNorm`: a LayerNorm too, for rules that ask for the class."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        LiveValues.__init__(self, entries)

    def extra_repr(self) -> str:
        """Say how many tensors are held."""
        return f"{len(self.entries)} tensors"


def register_values(model: nn.Module, entries: Sequence[Entry]) -> None:
    """Register trainable tensors on a model's root, so that optimizers, DDP and Trainer see them.

    Tensors owned by an `nn.LayerNorm` get a container that is one too: weight-decay rules ask for the class.
    """
    norm = {e.name for e in entries if isinstance(model.get_submodule(e.name.rpartition(".")[0]), nn.LayerNorm)}
    for kind, suffix, wanted in ((LiveValues, "", False), (LiveNormValues, "_norm", True)):
        mine = [e for e in entries if (e.name in norm) is wanted]
        if mine:
            model.add_module(CHILD + suffix, kind(mine))


def unregister_values(model: nn.Module) -> None:
    """Take the containers off."""
    for suffix in ("", "_norm"):
        if hasattr(model, CHILD + suffix):
            delattr(model, CHILD + suffix)


class Claim:
    """Says on a module which attachment trains it; a copy of it says nothing, as nothing trains the copy.

    Args:
        mount: the attachment, held weakly; None for none.
    """

    def __init__(self, mount: object = None) -> None:
        self.mount = None if mount is None else weakref.ref(mount)

    def holder(self) -> object:
        """Return the attachment, or None if it is gone."""
        return None if self.mount is None else self.mount()

    def __deepcopy__(self, memo: dict[int, Any]) -> Claim:
        return Claim()

    def __reduce__(self) -> Any:
        return Claim, ()


def check_free(model: nn.Module, within: object = None) -> None:
    """Raise if an attachment, other than the one this is a part of, trains any of a model's modules.

    Raises:
        RunError: it does.
    """
    for module in model.modules():
        claim: Claim | None = module.__dict__.get(CLAIM)
        if claim is not None and claim.holder() not in (None, within):
            raise RunError(
                "this model is being trained by another attachment; leave that block first, or attach both at once"
            )


def claim(model: nn.Module, mount: object) -> None:
    """Say on every module of a model that an attachment trains it."""
    for module in model.modules():
        module.__dict__[CLAIM] = Claim(mount)


def disclaim(model: nn.Module, mount: object) -> None:
    """Take back what `claim` said."""
    for module in model.modules():
        held: Claim | None = module.__dict__.get(CLAIM)
        if held is not None and held.holder() is mount:
            del module.__dict__[CLAIM]
