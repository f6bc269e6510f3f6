"""What methods are given: a locator or an edit sees a Context, an objective a Step, a loop obeys a Phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.errors import RequestError, one_of
from neurograft.core.region import Region
from neurograft.core.seeds import generator
from neurograft.core.units import Site

if TYPE_CHECKING:
    from neurograft.core.prompts.requests import Request

Batch = dict[str, Any]
IGNORE = -100
POSITIONS = ("all", "last", "answer", "prompt")


@dataclass
class Context:
    """What a locator or an edit may see.

    Args:
        model: the model, in evaluation mode, on its device; to be left as found.
        sites: the units in question.
        batches: model inputs, tensors on the model's device.
        contrast: a second set of batches, for methods that compare.
        groups: several sets of batches by name (languages, tasks), for methods that compare more than two.
        loss: (model, batch) -> scalar loss, the bound objective.
        asked: the objective itself, for methods that tell it the number of their step; `loss` is asked if None.
        target: (outputs, batch) -> scalar, for attributions to something other than the loss.
        positions: which tokens count: one of `POSITIONS`, or a callable batch -> bool [B, T].
        processor: tokenizer or processor, if there is one.
        requests: edit requests.
        against: a second model or a graft to compare with.
        rehearse: runs a short training on a selection and returns the graft, for methods that must train.
        seed: root of every named generator.
    """

    model: nn.Module
    sites: Mapping[str, Site]
    batches: Sequence[Batch] = ()
    contrast: Sequence[Batch] = ()
    loss: Callable[[nn.Module, Batch], Tensor] | None = None
    target: Callable[[Any, Batch], Tensor] | None = None
    positions: str | Callable[[Batch], Tensor] = "all"
    processor: Any = None
    requests: Sequence[Request] = ()
    against: Any = None
    rehearse: Callable[..., Any] | None = None
    seed: int = 0
    groups: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    asked: Callable[[Step], Tensor] | None = None

    def generator(self, *names: object) -> torch.Generator:
        """Return the generator of that name."""
        return generator(self.seed, *names)

    def by_group(self) -> dict[str, Sequence[Batch]]:
        """Return the groups by name; batches and contrast are the groups "positive" and "negative".

        Raises:
            RequestError: fewer than two groups, or one without data.
        """
        found = dict(self.groups)
        if not found and self.contrast:
            found = {"positive": self.batches, "negative": self.contrast}
        empty = [name for name, batches in found.items() if not batches]
        if len(found) < 2 or empty:
            raise RequestError(
                f"no data for the group {empty[0]!r}" if empty else f"data of {max(1, len(found))} group",
                expected="at least two groups to compare",
                do="give rows with a `group` column, or with `positive` and `negative`",
            )
        return found

    def mask(self, batch: Batch) -> Tensor | None:
        """Return which tokens of a batch count, bool [B, T], or None if it has no tokens."""
        return token_mask(batch, self.positions)

    def scalar(self, batch: Batch, *, step: int = 0) -> Tensor:
        """Run the model with gradients and return what is attributed: the target if there is one, else the loss.

        The loss of a batch is the mean of its rows' own losses (`Step.apart`), so that scores do not depend on how
        examples are batched. `step` is for losses that draw: one number, one draw.
        """
        if self.target is not None:
            return self.target(self.model(**batch), batch)
        if self.asked is not None:
            return self.asked(Step(self.model, batch, step=step, apart=True))
        if self.loss is None:
            raise RequestError(
                "no objective and no target",
                expected="one of them",
                do="pass objective='auto' with labelled data, or target=callable",
            )
        return self.loss(self.model, batch)


def unlabelled(batch: Mapping[str, Any]) -> Batch:
    """Return a batch without its labels: what a model is given to predict, and not to compute its loss.

    Example:
        >>> unlabelled({"input_ids": 1, "labels": 2})
        {'input_ids': 1}
    """
    return {k: v for k, v in batch.items() if k != "labels"}


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter is, and so its inputs belong; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def token_mask(batch: Batch, positions: str | Callable[[Batch], Tensor] = "all") -> Tensor | None:
    """Return which tokens of a batch count, bool [B, T], or None for batches without tokens.

    "all": every token but padding; "last": the last of those; "answer": tokens with a label; "prompt": tokens
    before the first labelled one.

    Raises:
        RequestError: labels are asked for and missing, or a callable returns another shape.

    Example:
        >>> batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
        >>> token_mask(batch, "last").tolist()
        [[False, False, True, False]]
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds", batch.get("decoder_input_ids")))
    if tokens is None:
        if positions != "all":
            raise RequestError(
                f"positions={positions!r} for data without tokens", expected="positions='all'", do="leave positions out"
            )
        return None
    shape = tuple(tokens.shape[:2])
    attention = batch.get("attention_mask")
    real = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    if attention is not None and attention.dim() == 2:
        real = attention.bool()
    if callable(positions):
        chosen = positions(batch)
        if tuple(chosen.shape) != shape:
            raise RequestError(
                f"positions of shape {tuple(chosen.shape)}",
                expected=f"bool {shape}",
                do="return one flag for each token",
            )
        return chosen.bool() & real
    one_of(positions, POSITIONS, what="positions")
    index = torch.arange(shape[1], device=tokens.device)
    if positions == "all":
        return real
    if positions == "last":
        last = torch.where(real, index, -1).max(dim=1).values
        return real & (index == last[:, None])
    labels = batch.get("labels")
    if labels is None or tuple(labels.shape) != shape:
        raise RequestError(
            f"positions={positions!r} for data without token labels",
            expected="labels [B, T]",
            do="give prompt/completion rows, or positions='all' or 'last'",
        )
    labelled = labels != IGNORE
    if positions == "answer":
        return labelled & real
    first = torch.where(labelled, index, shape[1]).min(dim=1).values
    return real & (index < first[:, None])


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
        if "outputs" in self.__dict__ or "labels" in _only_from_labels(self.model):
            return self.outputs
        return self.call(**unlabelled(self.batch))

    @cached_property
    def _scored(self) -> tuple[Tensor, Tensor, Tensor]:
        labels = self.batch.get("labels")
        if labels is None:
            raise RequestError(
                "a batch without labels", expected="labels", do="give labelled rows, or a callable objective"
            )
        logits = self.predictions.logits
        if shifts(self.model):
            logits, labels = logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]
        if logits.shape[:-1] != labels.shape:
            raise RequestError(
                f"logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}",
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
        chosen = logits[keep]
        return chosen if chosen.dtype == torch.float64 else chosen.float(), labels[keep], keep

    def scored(self) -> tuple[Tensor, Tensor]:
        """Return logits float32 [N, V] and labels [N] of the labelled tokens, shifted if the model predicts ahead."""
        return self._scored[:2]

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probability of each labelled token, [N], with gradient."""
        logits, labels = self.scored()
        return -F.cross_entropy(logits, labels, reduction="none")

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
        keep = self._scored[2]
        rows = keep.nonzero()[:, 0]
        counts = torch.bincount(rows, minlength=len(keep))
        return None if bool((counts == counts[0]).all()) else 1 / (len(keep) * counts[rows])


def _only_from_labels(model: nn.Module) -> tuple[str, ...]:
    # Encoder-decoders make their decoder's input from the labels.
    config = getattr(model, "config", None)
    return ("labels",) if getattr(config, "is_encoder_decoder", False) else ()


def shifts(model: nn.Module) -> bool:
    """Say whether position t of the logits predicts token t + 1."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    kind = getattr(model, "loss_type", None) or ""
    return kind in ("ForCausalLM", "ForConditionalGeneration", "ForImageTextToText") or type(model).__name__.endswith(
        ("ForCausalLM", "LMHeadModel")
    )


@dataclass(frozen=True)
class Phase:
    """What a schedule says of one step.

    Args:
        awake: names of the trainable tensors that move; None for all.
        lr: name -> learning-rate multiplier, 1 where absent.
        moments: what happens to a tensor's optimizer state when it falls asleep: "keep" or "drop".
        values: what happens then to its values: "keep", what is left behind stays and stops moving, or "rewind", it
            goes back to what the training began with; where the locator is called again, everything goes back to the
            base and the new choice starts there.
        reselect: whether the loop should call the locator again and carry the values over.
        turn: how often the selection has changed up to this step, for schedules that select anew.
        stage: name of the stage, for logs and for swapping objective or data.
    """

    awake: frozenset[str] | None = None
    lr: Mapping[str, float] = field(default_factory=dict)
    moments: str = "keep"
    reselect: bool = False
    values: str = "keep"
    turn: int = 0
    stage: str = ""
