"""What an objective sees: one training step, with what the model says to its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.batches import IGNORE, Batch, shifts
from neurograft.core.errors import RequestError
from neurograft.core.likelihood import label_log_probs
from neurograft.core.region import Region
from neurograft.core.running import run


@dataclass(frozen=True)
class Trained:
    """Numbers of one parameter that are being trained.

    Args:
        values: as they are now, with gradient.
        region: which entries of the parameter they are.
        original: what the base holds there, in its dtype, maybe on another device.
    """

    values: Tensor
    region: Region
    original: Tensor


@dataclass
class Step:
    """What an objective may see of one training step.

    Args:
        model: the model being trained.
        batch: its inputs.
        step: optimizer steps made so far.
        max_steps: optimizer steps in all, or 0 if not known.
        items: number of labelled tokens over the whole accumulation window, or None for this batch alone.
        reference: runs something on the base, the change taken out; for anchors.
        extra: columns of the data that are no model inputs.
        wrapped: what to call instead of the model, if it is wrapped (DDP, a compiled module).
        trained: called, gives parameter -> what is trained of it, for penalties on the change; empty where the change
            is of another shape (low rank, beside the weight).
        apart: let every row of the batch count alike, whatever its number of labelled tokens, as it would alone;
            for locators, whose scores must not depend on how examples are batched.
        rows: number of examples over the whole accumulation window, or None for this batch alone; for losses that are
            means over examples.
        counted: set by `mean`: the loss is a share of the whole window's, so shares add up and need no averaging.
    """

    model: nn.Module
    batch: Batch
    step: int = 0
    max_steps: int = 0
    items: Tensor | int | None = None
    reference: Callable[[Callable[[], Any]], Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    wrapped: Callable[..., Any] | None = None
    trained: Callable[[], Mapping[str, Trained]] = dict
    apart: bool = False
    rows: Tensor | int | None = None
    counted: bool = field(default=False, init=False)

    @cached_property
    def outputs(self) -> Any:
        """The model's outputs on the batch, computed once."""
        return self.call(**self.batch)

    @property
    def call(self) -> Callable[..., Any]:
        """What to call with model inputs, so that wrappers see it."""
        return self.model if self.wrapped is None else self.wrapped

    @cached_property
    def predictions(self) -> Any:
        """The model's outputs without its own loss where it can do without labels; computed once."""
        return self.outputs if "outputs" in self.__dict__ else run(self.model, self.batch, call=self.call)

    @cached_property
    def _labelled(self) -> tuple[Tensor, Tensor, Tensor]:
        """The places that have a label, int64 [N] among all of the logits, their labels [N], and which they are."""
        labels = self.batch.get("labels")
        if labels is None:
            raise RequestError(
                "a batch without labels", expected="labels", do="give labelled rows, or a callable objective"
            )
        logits: Tensor = self.predictions.logits
        shape, first = tuple(logits.shape[:-1]), 0
        if shifts(self.model):
            first = max(0, logits.shape[1] - labels.shape[1])
            shape, labels = (len(logits), logits.shape[1] - first - 1), labels[:, 1:]
        if shape != tuple(labels.shape):
            raise RequestError(
                f"logits of shape {(*shape, logits.shape[-1])} for labels of shape {tuple(labels.shape)}",
                expected="one row of logits for each label",
                do="use a loss of the model's own for this kind of model",
            )
        keep = labels != IGNORE
        if not bool(keep.any()):
            raise RequestError(
                "a batch in which no token has a label",
                expected="at least one labelled token",
                do="drop empty answers, or raise the truncation length",
            )
        at = torch.arange(logits.shape[:-1].numel(), device=keep.device).view(logits.shape[:-1])
        at = at[:, first:-1] if shifts(self.model) else at
        return at[keep].to(logits.device), labels[keep].to(logits.device), keep

    @property
    def _rows(self) -> Tensor:
        """The logits as [M, V], a view where they lie in one piece."""
        logits: Tensor = self.predictions.logits
        return logits.reshape(-1, logits.shape[-1])

    def scored(self) -> tuple[Tensor, Tensor]:
        """Return logits float32 [N, V] and labels [N] of the labelled tokens, shifted if the model predicts ahead.

        They are a copy, made anew each time: over a large vocabulary nobody should hold it for longer than needed.
        """
        at, labels, _ = self._labelled
        chosen = self._rows[at]
        return chosen if chosen.dtype == torch.float64 else chosen.float(), labels

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probability of each labelled token, [N], with gradient."""
        at, labels, _ = self._labelled
        return label_log_probs(self._rows, at, labels)

    def entropy(self, *, top: int | None = None) -> Tensor:
        """Return the entropy in nats of the prediction at each labelled token, [N].

        Args:
            top: of the distribution renormalised over this many largest logits; None for the whole one.
        """
        logits, _ = self.scored()
        if top is not None:
            logits = logits.topk(min(top, logits.shape[-1]), dim=-1).values
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    def mean(self, per_token: Tensor) -> Tensor:
        """Return the sum of per-token losses divided by the number of labelled tokens of the accumulation window.

        With `apart` it is the mean over the batch's rows of their own means; a row without a label counts as 0.
        """
        if self.items is None:
            shares = self._shares if self.apart else None
            return per_token.sum() / per_token.numel() if shares is None else (per_token * shares).sum()
        self.counted = True
        return per_token.sum() / self.items

    def share(self, count: Tensor | int) -> Tensor | float:
        """Return what a term over `count` labelled tokens is of the window's, 1 where the loss counts no tokens."""
        return count / self.items if self.counted and self.items is not None else 1.0

    def of_base(self, ask: Callable[[], Any], *, who: str, do: str = "use it as objective= of tune or fit") -> Any:
        """Return what is asked of the base: the change taken out, in evaluation mode, without gradients.

        Args:
            ask: what to ask.
            who: the objective that asks.
            do: where it could be used.

        Raises:
            RequestError: the training offers no base.
        """
        if self.reference is None:
            raise RequestError(f"{who} without a reference", expected="a training that can take the change out", do=do)
        with torch.no_grad():
            return self.reference(ask)

    @cached_property
    def _shares(self) -> Tensor | None:
        """What each labelled token counts where rows count alike, [N]; None where tokens do so too."""
        keep = self._labelled[2]
        rows = keep.nonzero()[:, 0]
        counts = torch.bincount(rows, minlength=len(keep))
        return None if bool((counts == counts[0]).all()) else 1 / (len(keep) * counts[rows])
