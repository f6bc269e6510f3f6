"""Tiny models trained in seconds: bases that know something, for proofs about tuning and forgetting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from neurograft.core.context import unlabelled
from neurograft.core.errors import one_of
from neurograft.core.seeds import derive, generator
from neurograft.worlds.images import images
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pairs import pairs
from neurograft.worlds.pico import pico
from neurograft.worlds.vectors import CLASSES, FEATURES, vectors


@dataclass
class Scored(ModelOutput):  # type: ignore[misc]
    """What `Perceptron` returns: the loss, if there were labels, and logits [B, classes]."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class Perceptron(nn.Module):
    """Two hidden layers and a head, called like a transformers model.

    Args:
        hidden: width.
        seed: names the weights.
    """

    def __init__(self, hidden: int = 64, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "perceptron"))
            self.first, self.second = nn.Linear(FEATURES, hidden), nn.Linear(hidden, hidden)
            self.head = nn.Linear(hidden, CLASSES)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scored:
        """Return logits, and the cross-entropy if labels are given."""
        logits = self.head(self.second(self.first(features).relu()).relu())
        return Scored(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def fit(model: nn.Module, batches: Sequence[Mapping[str, Any]], *, lr: float = 3e-3) -> nn.Module:
    """Train every parameter with AdamW, one step a batch, warm-up and linear decay; return the model, evaluating.

    The plainest loop there is; what is proved elsewhere is not proved with it.
    """
    steps, optimizer = len(batches), torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the share of right classes."""
    hits = [(model(**unlabelled(b)).logits.argmax(-1) == b["labels"]) for b in batches]
    return float(torch.cat(hits).float().mean())


def tiny(kind: str = "llama", *, steps: int | None = None, seed: int = 0, **config: Any) -> nn.Module:
    """Train a tiny model from scratch on its synthetic data and return it in evaluation mode.

    Args:
        kind: "llama" (copy, reverse, modular addition), "bert" (masked tokens of `pairs`), "vit" (orientation of
            stripes), "mlp" (task "a" of `vectors`). Of dropout there is none.
        steps: training steps; the default suffices to learn the task (300, 300, 120, 200).
        seed: names the weights and the data.
        **config: fields of the config.

    Example:
        >>> from neurograft.worlds.vectors import vectors
        >>> accuracy(tiny("mlp"), vectors(count=4, seed=1)) > 0.8
        True
    """
    make, data, default, lr = _KINDS[one_of(kind, _KINDS, what="tiny model")]
    model = make(seed, config)
    return fit(model, data(steps or default, derive(seed, "tiny", kind)), lr=lr)


def classifier(encoder: Any, labels: int, *, seed: int = 0) -> nn.Module:
    """Return a BertForSequenceClassification on a copy of a masked-token model's encoder, with a fresh head."""
    config = {**encoder.config.to_dict(), "num_labels": labels, "id2label": None, "label2id": None}
    kept = {k: v for k, v in config.items() if k not in ("architectures", "transformers_version", "dtype")}
    model = pico("bert", seed=seed, **{k: v for k, v in kept.items() if v is not None})
    state = {n: p for n, p in encoder.state_dict().items() if n.startswith("bert.")}
    model.load_state_dict(state, strict=False)
    return model


def llama(seed: int = 0, **config: Any) -> nn.Module:
    """Return an untrained decoder of the size of `tiny("llama")`, drawn so that it learns fast."""
    return _widened(pico("llama", seed=seed, **{**_SIZE, **config}), seed)


def _decoder(seed: int, config: dict[str, Any]) -> nn.Module:
    return llama(seed, **config)


def _encoder(seed: int, config: dict[str, Any]) -> nn.Module:
    from transformers import BertForMaskedLM

    size = {k: v for k, v in _SIZE.items() if k != "num_key_value_heads"}
    shape: Any = pico("bert", seed=seed, **{**size, **_STILL, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "tiny", "bert"))
        return _widened(BertForMaskedLM(shape.config), seed)


def _vision(seed: int, config: dict[str, Any]) -> nn.Module:
    return _widened(pico("vit", seed=seed, **{"num_labels": 4, **_STILL, **config}), seed)


def _perceptron(seed: int, config: dict[str, Any]) -> nn.Module:
    return Perceptron(seed=seed, **config)


def _widened(model: nn.Module, seed: int) -> nn.Module:
    """Redraw matrices at a scale at which so small a model learns in a few hundred steps."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                drawn = torch.randn(weight.shape, generator=generator(seed, "tiny", name))
                weight.copy_(drawn * (1.0 if name == "lm_head.weight" else 0.5) / weight.shape[1] ** 0.5)
    return model


_SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

_TASKS = ("copy", "reverse", "add", "add")  # 100 sums must be met often enough

# kind: (model, data, steps, learning rate)
_KINDS: Mapping[
    str, tuple[Callable[[int, dict[str, Any]], nn.Module], Callable[[int, int], list[dict[str, Tensor]]], int, float]
] = {
    "llama": (
        _decoder,
        lambda steps, seed: mixture(("copy", "reverse", "add", "add"), count=steps, batch=48, seed=seed),
        300,
        3e-3,
    ),
    "bert": (_encoder, lambda steps, seed: pairs("masked", count=steps, batch=48, seed=seed), 300, 1e-3),
    "vit": (_vision, lambda steps, seed: images(count=steps, batch=48, seed=seed), 120, 3e-3),
    "mlp": (_perceptron, lambda steps, seed: vectors(count=steps, batch=64, seed=seed), 200, 3e-3),
}
