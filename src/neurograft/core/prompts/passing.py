"""The forward pass under way: its batch, which of its tokens count, and where they stand.

Shape letters: B batch rows, T tokens of this pass, n units, w features of a unit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.batches import IGNORE, token_mask
from neurograft.core.errors import RequestError, RunError

INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids")
Positions = str | Callable[[dict[str, Any]], Tensor]
TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")
TOLD = "_neurograft_told"


@dataclass
class Pass:
    """What hooks know of the model's current forward pass.

    Args:
        number: forward passes so far, this one included.
        batch: the arguments of this pass by name, or None outside of one (an inner module called alone).
        offset: tokens that came before, in a key-value cache.
        first: tokens of the first pass, without a cache: of the batch, and of what the decoder is given.
    """

    number: int = 0
    batch: dict[str, Any] | None = None
    offset: int = 0
    first: tuple[int, int] = (0, 0)
    masks: dict[tuple[Any, bool], Tensor | None] = field(default_factory=dict)
    under_way: bool = False
    unfinished: int = 0
    task: int = -1
    two_sided: bool = False
    stood: set[str] = field(default_factory=set)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take over the arguments of a forward pass of the root."""
        names = list(inspect.signature(model.forward).parameters) if args else []
        self.batch = model.__dict__.get(TOLD) or {**dict(zip(names, args)), **kwargs}
        self.number += 1
        self.two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.offset = _cached(self.batch)
        if self.offset == 0:
            self.first = (_width(self.batch, TOKENS), _width(self.batch, ("decoder_input_ids", "labels")))
        self.masks, self.stood, self.under_way = {}, set(), True
        self.unfinished += torch.is_grad_enabled()

    def end(self) -> None:
        """Note that the root has returned; a recomputation may still need the batch."""
        self.under_way = False

    def current(self) -> dict[str, Any] | None:
        """Return the batch that the running module belongs to, or None if it was called alone.

        Raises:
            RunError: a checkpointed module is recomputed and several passes are waiting for their backward pass.
        """
        if self.under_way:
            return self.batch
        task = recomputing()
        if task == -1:
            return None
        if task != self.task:
            self.task, waiting, self.unfinished = task, self.unfinished, 0
            if waiting > 1:
                raise RunError(
                    "a checkpointed module is recomputed while several forward passes wait for their backward pass, "
                    "so its tokens cannot be told; run backward after each forward pass, or turn checkpointing off"
                )
        return self.batch

    def mask(self, positions: Positions, *, decoder: bool = False) -> Tensor | None:
        """Return which tokens count, bool [B, T], or None for a pass without tokens.

        Beyond the words of `token_mask`, "generated" means tokens that a cache puts behind the first pass.
        """
        key = (positions, decoder)
        if key not in self.masks:
            batch = self.current()
            word = "all" if positions == "generated" else positions
            told = {} if batch is None else _told(batch, decoder)
            if self.two_sided and not decoder and not callable(word):
                told.pop("labels", None)  # they are the decoder's, also where both sides are of one length
            flags = None if batch is None else token_mask(told, word)
            if positions == "generated" and flags is not None and self.offset == 0:
                flags = torch.zeros_like(flags)
            self.masks[key] = flags
        return self.masks[key]


@contextmanager
def told(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Let taps of a model take its passes in the block for passes of this batch, whatever it is called with.

    Which tokens count may depend on columns the model is better called without, such as labels.

    Example:
        >>> net, now = nn.Identity(), Pass()
        >>> with told(net, {"x": 1, "labels": 2}):
        ...     now.begin(net, (), {"x": 1})
        >>> now.batch
        {'x': 1, 'labels': 2}
    """
    held = model.__dict__.get(TOLD)
    model.__dict__[TOLD] = dict(batch)
    try:
        yield
    finally:
        if held is None:
            del model.__dict__[TOLD]
        else:
            model.__dict__[TOLD] = held


def recomputing() -> int:
    """Return the number of the backward pass that this forward code runs inside of, or -1."""
    found: int = torch._C._current_graph_task_id()
    return found


def tokens_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that gives a batch its [B, T], or None."""
    for name in TOKENS:
        if batch.get(name) is not None:
            found: Tensor = batch[name]
            return found
    return None


def examples(batch: Mapping[str, Any]) -> int:
    """Return how many examples a batch holds, 0 if that cannot be told."""
    named = [batch[n] for n in INPUTS if isinstance(batch.get(n), Tensor)]
    return next((len(v) for v in (*named, *batch.values()) if isinstance(v, Tensor) and v.dim()), 0)


def _width(batch: Mapping[str, Any], names: Sequence[str]) -> int:
    """Return how long the rows of the first of these inputs are; a classifier's labels have no length."""
    given = (batch[n] for n in names if batch.get(n) is not None)
    return next((t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() > 1), 0)


def _cached(batch: Mapping[str, Any]) -> int:
    cache: Any = batch.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _told(batch: Mapping[str, Any], decoder: bool) -> dict[str, Any]:
    """Return a batch as `token_mask` reads it: of this pass only, and of the decoder if that is meant."""
    told = {k: v for k, v in batch.items() if v is not None}
    if decoder:
        labels, ids = told.get("labels"), told.get("decoder_input_ids", told.get("labels"))
        told = {} if ids is None else {"input_ids": ids}
        if labels is not None and ids is not None and labels.shape == ids.shape:
            told |= {"labels": labels, "attention_mask": (labels != IGNORE).long()}
        if batch.get("decoder_attention_mask") is not None:
            told["attention_mask"] = batch["decoder_attention_mask"]
    tokens = tokens_of(told)
    attention = told.get("attention_mask")
    if tokens is not None and attention is not None and attention.dim() == 2:
        told["attention_mask"] = attention[:, -tokens.shape[1] :]
    return told


@dataclass(frozen=True)
class Seen:
    """Where the activations that a hook was given stand.

    Args:
        now: the pass.
        lead: shape of the activations without units and features.
        tokens: for activations that are a list of tokens (inside an expert), their number b * T + t; else None.
        decoder: whether the module belongs to the decoder of an encoder-decoder.
        model: the root.
    """

    now: Pass
    lead: tuple[int, ...]
    tokens: Tensor | None
    decoder: bool
    model: nn.Module

    def mask(self, positions: Positions = "all") -> Tensor | None:
        """Return which activations count, bool shaped `lead`; None if all do.

        Raises:
            RequestError: positions are asked for and these activations do not stand at the batch's tokens.
        """
        flags = self.now.mask(positions, decoder=self.decoder)
        if flags is None:
            flags = self._frames()
        if flags is not None and self.tokens is not None:
            return flags.reshape(-1)[self.tokens.to(flags.device)]
        if flags is not None and self.lead == tuple(flags.shape):
            return flags
        if flags is not None and len(self.lead) == 1 and self.lead[0] == flags.numel():
            return flags.reshape(-1)
        if positions != "all":
            raise RequestError(
                f"positions={positions!r} at activations of shape {self.lead}",
                expected="a site whose activations stand at the batch's tokens",
                do="leave positions at 'all', or choose other sites",
            )
        return None

    def astray(self, name: str) -> bool:
        """Say whether a site that stood at the batch's tokens in this pass is met at something else now.

        DeBERTa projects its relative positions with the weights of its tokens: they belong to no example.
        """
        either = self.now.two_sided or self.tokens is not None  # embeddings of encoder-decoders serve both sides
        flags = None if either else self.now.mask("all")
        if flags is None:
            return False
        if self.lead in (tuple(flags.shape), (flags.numel(),)):
            self.now.stood.add(name)
            return False
        return name in self.now.stood

    def _frames(self) -> Tensor | None:
        """Return the mask of an audio model's frames, which are fewer than its samples."""
        batch = self.now.current() or {}
        attention, shrink = batch.get("attention_mask"), getattr(self.model, "_get_feature_vector_attention_mask", None)
        if attention is None or shrink is None or len(self.lead) != 2 or tokens_of(batch) is not None:
            return None
        if self.lead[1] >= attention.shape[-1]:
            return None
        config: Any = getattr(self.model, "config", None)
        samples, all_of_them = attention.sum(-1), attention.shape[-1]
        steps = zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()))
        for kernel, stride in steps:  # each convolution has frames of its own; `shrink` knows the last one's only
            samples, all_of_them = (samples - kernel) // stride + 1, (all_of_them - kernel) // stride + 1
            if all_of_them == self.lead[1]:
                return torch.arange(all_of_them, device=samples.device) < samples[:, None]
        found: Tensor = shrink(self.lead[1], attention).bool()
        return found

    @property
    def first(self) -> int:
        """How many tokens the first pass brought: where positions from its end are counted from."""
        return self.now.first[self.decoder]

    def place(self) -> tuple[Tensor, Tensor]:
        """Return the batch row and the position of each activation, int64 shaped `lead`, on the CPU.

        Positions count from the first token ever seen, so that they go on through a key-value cache. Several on the
        first axis for each row, such as the windows an image is cut into, are taken as that row's; where they do not
        go into the rows, what they stand at is no example's, and the row is -1.
        """
        batch = self.now.current() or {}
        ids = tokens_of(_told(batch, self.decoder))
        width = 1 if ids is None else ids.shape[1]
        if self.tokens is not None:
            tokens = self.tokens.cpu()  # a router's choice, made where the experts are
            return tokens // width, tokens % width + self.now.offset
        if len(self.lead) == 1 and ids is not None and self.lead[0] == ids.shape[0] * width:
            flat = torch.arange(self.lead[0], device="cpu")
            return flat // width, flat % width + self.now.offset
        rest, first = self.lead[1:], torch.arange(self.lead[0], device="cpu").reshape(-1, *[1] * (len(self.lead) - 1))
        inside = math.prod(rest)
        windows, odd = divmod(self.lead[0], examples(batch) or self.lead[0])
        told = not odd and (windows == 1 or len(rest) > 0)
        rows = first // windows if told else torch.full_like(first, -1)
        count = torch.arange(inside, device="cpu").reshape(1, *rest) + (first % windows * inside if told else 0)
        offset = self.now.offset if len(self.lead) == 2 else 0
        return rows.expand(self.lead), count.expand(self.lead) + offset
