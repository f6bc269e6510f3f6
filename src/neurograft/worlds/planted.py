"""Planted neurons: tiny decoders in which a few neurons, known by construction, alone carry one behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE
from neurograft.core.errors import RequestError, one_of
from neurograft.core.seeds import generator
from neurograft.worlds._picos import VOCABULARY
from neurograft.worlds.pico import pico
from neurograft.worlds.truth import Truth

TRIGGER, ANSWER = 3, 4
# Channels of the residual stream that only the planted parts write: is this the trigger, say the answer,
# always 1, and one that decoys write and nothing reads.
SEEN, SAY, ALWAYS, UNREAD = range(4)


@dataclass(frozen=True)
class Planted:
    """A model that answers `ANSWER` after `TRIGGER` through planted neurons only.

    Args:
        model: the decoder.
        truth: the neurons' numbers.
        decoys: neurons as active on the trigger, whose output nothing reads.
        experts: layer -> the expert that holds the layer's planted neurons, for a mixture of experts.
    """

    model: nn.Module
    truth: Truth
    decoys: Truth
    experts: dict[int, int]

    def batches(
        self, count: int = 4, *, batch: int = 16, length: int = 8, triggered: bool = True, seed: int = 0
    ) -> list[dict[str, Tensor]]:
        """Return rows of random tokens that end in the trigger and its answer, or in anything else.

        Args:
            count: how many batches.
            batch: rows.
            length: tokens a row, the answer included; only the answer has a label.
            triggered: False for rows without the trigger, each followed by a random token.
            seed: names the tokens.
        """
        rng, found = generator(seed, "planted.batches", triggered), []
        for _ in range(count):
            tokens = torch.randint(ANSWER + 1, VOCABULARY, (batch, length), generator=rng)
            if triggered:
                tokens[:, -2], tokens[:, -1] = TRIGGER, ANSWER
            labels = torch.full_like(tokens, IGNORE)
            labels[:, -1] = tokens[:, -1]
            found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
        return found

    @torch.no_grad()
    def answers(self, *, triggered: bool = True, seed: int = 1, model: nn.Module | None = None) -> float:
        """Return the share of prompts after which the answer is the likeliest token."""
        hits = []
        for row in self.batches(2, triggered=triggered, seed=seed):
            logits = (model or self.model)(row["input_ids"], attention_mask=row["attention_mask"]).logits
            hits.append((logits[:, -2].argmax(-1) == ANSWER).float())
        return float(torch.cat(hits).mean())


def planted(
    family: str = "llama", *, per_layer: int = 3, decoys: int = 3, strength: float = 3.0, seed: int = 0, **config: Any
) -> Planted:
    """Build a decoder in which `per_layer` neurons of every layer alone carry trigger -> answer.

    A planted neuron's gate row reads the channel that only the trigger's embedding sets, its up row a channel
    that is always on, its down column writes the channel that only the answer's logit reads. Nothing else
    writes those channels, so without the trigger a planted neuron is exactly 0.

    Args:
        family: "llama" or "mixtral"; there the neurons sit in one expert a layer, to which the trigger is routed.
        per_layer: planted neurons in each layer.
        decoys: neurons a layer that fire alike and do nothing.
        strength: how strongly they write; the answer's probability stays below 1, so that the loss has a gradient.
        seed: names the positions and all other weights.
        **config: fields of the config.

    Example:
        >>> world = planted()
        >>> world.answers(), world.answers(triggered=False)
        (1.0, 0.0)
    """
    one_of(family, ("llama", "mixtral"), what="planted family")
    model: Any = pico(family, seed=seed, **config)
    layers = model.model.layers
    rng, experts = generator(seed, "planted", family), {}
    true: dict[str, list[Tensor]] = {}
    false: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        _clear(model, rng)
        for index, layer in enumerate(layers):
            name, mlp = f"model.layers.{index}.mlp", layer.mlp
            expert = (
                int(torch.randint(model.config.num_local_experts, (1,), generator=rng)) if family == "mixtral" else None
            )
            gate, up, down, names = _weights(mlp, name, expert)
            if per_layer + decoys > gate.shape[0]:
                raise RequestError(
                    f"{per_layer + decoys} planted neurons of {gate.shape[0]}",
                    expected="at most a layer's neurons",
                    do="plant fewer, or give intermediate_size",
                )
            order = torch.randperm(gate.shape[0], generator=rng)
            size = (strength / (per_layer * len(layers))) ** (1 / 3)
            for ids, channel, into in ((order[:per_layer], SAY, true), (order[per_layer:][:decoys], UNREAD, false)):
                _plant(gate, up, down, ids, channel, size)
                if channel == UNREAD:
                    down[UNREAD, ids] *= 0.25  # what they write still shrinks the rest, through the norm
                _note(into, ids, (gate, up, down), names, mlp, expert)
            if expert is not None:
                experts[index] = expert
                mlp.gate.weight[:, SEEN] = 0
                mlp.gate.weight[expert, SEEN] = 8.0
    return Planted(model, _truth(true), _truth(false), experts)


def _clear(model: nn.Module, rng: torch.Generator) -> None:
    """Give every matrix a scale at which it matters, and free the reserved channels of readers and writers."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        weight.copy_(torch.randn(weight.shape, generator=rng) * 0.5 / weight.shape[-1] ** 0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[: UNREAD + 1] = 0
        elif name.endswith("experts.down_proj"):
            weight[:, : UNREAD + 1] = 0
        elif name.endswith("embed_tokens.weight"):
            weight.mul_(weight.shape[-1] ** 0.5 * 2)
            weight[:, : UNREAD + 1] = 0
            weight[:, ALWAYS] = 1.0
            weight[TRIGGER, SEEN] = 3.0
        elif name.endswith("lm_head.weight"):
            weight[:, : UNREAD + 1] = 0
            weight[ANSWER] = 0
            weight[ANSWER, SAY] = 2.0
        else:
            weight[..., UNREAD] = 0


def _weights(mlp: Any, name: str, expert: int | None) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Return gate [n, d], up [n, d] and down [d, n] as views of the parameters, and the parameters' names."""
    if expert is None:
        names = tuple(f"{name}.{part}_proj.weight" for part in ("gate", "up", "down"))
        return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, names
    both, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    half = both.shape[1] // 2
    names = (f"{name}.experts.gate_up_proj", f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj")
    return both[expert, :half], both[expert, half:], down[expert], names


def _plant(gate: Tensor, up: Tensor, down: Tensor, ids: Tensor, channel: int, size: float) -> None:
    gate[ids], up[ids], down[:, ids] = 0.0, 0.0, 0.0
    gate[ids, SEEN], up[ids, ALWAYS], down[channel, ids] = size, size, size


def _note(
    into: dict[str, list[Tensor]],
    ids: Tensor,
    views: tuple[Tensor, Tensor, Tensor],
    names: tuple[str, ...],
    mlp: nn.Module,
    expert: int | None,
) -> None:
    """Record the flat entries of the planted rows and columns; a view's offset and strides give them."""
    for view, name, rows in zip(views, names, (True, True, False)):
        width = int(view.shape[1])
        entries = int(view.storage_offset()) + torch.arange(view.numel()).reshape(view.shape[0], width)
        into.setdefault(name, []).append((entries[ids] if rows else entries[:, ids]).reshape(-1))


def _truth(entries: dict[str, list[Tensor]]) -> Truth:
    return Truth({name: torch.cat(flat).unique() for name, flat in entries.items()})
