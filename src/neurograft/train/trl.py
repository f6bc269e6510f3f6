"""TRL's fused head: per-token fields instead of logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from neurograft.core.compact.mount import Mount
from neurograft.core.context import Step
from neurograft.core.errors import RequestError


@dataclass
class FusedStep(Step):
    """A step whose outputs are those of TRL's fused head: `log_probs` and `entropy` of every position, no logits.

    Args:
        fused: the outputs; `label_mask` says which positions count.
    """

    fused: Any = None

    @cached_property
    def outputs(self) -> Any:
        """The fused outputs."""
        return self.fused

    @cached_property
    def predictions(self) -> Any:
        """The fused outputs."""
        return self.fused

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probability of each labelled token, [N], with gradient."""
        found: Tensor = self.fused.log_probs[self.fused.label_mask]
        return found

    def entropy(self, *, top: int | None = None) -> Tensor:
        """Return the entropy in nats of the whole prediction at each labelled token, [N].

        Raises:
            RequestError: the entropy of the top logits is asked for, or the head computes none.
        """
        if top is not None or self.fused.entropy is None:
            raise RequestError(
                f"the entropy of the {top} largest logits under TRL's fused head",
                expected="the entropy of the whole distribution",
                do="pass the objective with {'top': None}, or train with neurograft.tune or transformers.Trainer",
            )
        found: Tensor = self.fused.entropy[self.fused.label_mask]
        return found

    def scored(self) -> tuple[Tensor, Tensor]:
        """Refuse: a fused head makes no logits.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "an objective or anchor that needs logits under TRL's fused head",
            expected="one of log-probabilities and entropy",
            do="train with neurograft.tune or transformers.Trainer",
        )


def is_trl(trainer: Any) -> bool:
    """Say whether a trainer is one of TRL's, which compute the head's product in a kernel of their own."""
    return any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__)


def heads(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose weight TRL's kernel reads past the module."""
    get: Any = getattr(model, "get_output_embeddings", None)
    found = None if get is None else get()
    return [found] if isinstance(found, nn.Module) else []


def check_head(model: nn.Module, mount: Mount) -> None:
    """Raise if an adapter wraps the head or hooks it: the kernel would read its base weight and leave the adapter out.

    Raises:
        RequestError: it does.
    """
    for head in heads(model):
        wrapped = getattr(head, "base_layer", None) is not None
        hooked = any(getattr(live, "owner", None) is head for live in getattr(mount, "lives", ()))
        if wrapped or hooked:
            raise RequestError(
                "an adapter around the output head in a TRL trainer, whose fused head reads the weight itself",
                expected="a head of plain numbers trained by adapter='slice', or no trained head",
                do="leave the head out of the selection, or train with transformers.Trainer",
            )
