"""Rows for new tokens: a vocabulary that grows for as long as a graft is on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.units import Parameters

SIZES = ("num_embeddings", "out_features")


class Growth:
    """Zeros appended to a parameter or buffer under all of its names, a row for each new token, and the way back.

    Args:
        model: the model.
        name: an embedding, a head or a bias; a [1, tokens] tensor gets columns.
        rows: how many tokens it is to have.
    """

    def __init__(self, model: nn.Module, name: str, rows: int) -> None:
        alias = Parameters.of(model).alias
        self.model, self.old = model, _held(model, name)
        self.names = [n for n, key in alias.items() if key == alias[name]] if name in alias else [name]
        self.dim = 1 if self.old.dim() == 2 and len(self.old) == 1 else 0
        self.before = self.old.shape[self.dim]
        self.sizes: list[tuple[object, str, int]] = []
        shape = [*self.old.shape]
        shape[self.dim] = rows - self.before
        added = torch.zeros(shape, dtype=self.old.dtype, device=self.old.device)
        new: Tensor = torch.cat([self.old.detach(), added], self.dim)
        if isinstance(self.old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=self.old.requires_grad)
        self._place(new)
        owners = {n.rpartition(".")[0] for n in self.names}
        for prefix in owners:
            for size in SIZES:
                self._resize(model.get_submodule(prefix), size, rows)
        entry, head = _ends(model)
        for end, size in ((entry, "vocab_size"), (head, "decoder_vocab_size")):
            for owner in (model, _text_config(model)) if end in owners else ():  # losses read either
                self._resize(owner, size, rows)

    def _place(self, tensor: Tensor) -> None:
        for name in self.names:
            prefix, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(prefix)
            if isinstance(tensor, nn.Parameter):
                owner._parameters[leaf] = tensor
            else:
                owner._buffers[leaf] = tensor

    def _resize(self, owner: object, size: str, rows: int) -> None:
        before = getattr(owner, size, None)
        if before == self.before:
            self.sizes.append((owner, size, before))
            setattr(owner, size, rows)

    def remove(self) -> None:
        """Put the tensor and the sizes back, with what the shared rows hold now, as and where the model is now."""
        now = _held(self.model, self.names[0]).detach().narrow(self.dim, 0, self.before)
        if (now.dtype, now.device) == (self.old.dtype, self.old.device):
            self.old.data.copy_(now)
        else:
            self.old.data = now.clone()
        self._place(self.old)
        for owner, size, before in self.sizes:
            setattr(owner, size, before)


def grown(model: nn.Module, name: str, before: int, rows: int) -> list[Growth]:
    """Append rows if the parameter has just the base's number of them, to it and to all that goes with it.

    Args:
        model: the model.
        name: the parameter.
        before: how many rows the base has.
        rows: how many there are to be.

    Returns:
        What undoes it; nothing if the rows are there already.

    Example:
        >>> net = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4))
        >>> net[1].weight = net[0].weight
        >>> growths = grown(net, "0.weight", 4, 6)
        >>> tuple(net(torch.tensor([5])).shape), net[0].num_embeddings
        ((1, 6), 6)
        >>> for growth in growths:
        ...     growth.remove()
        >>> net[0].num_embeddings, len(net[1].bias)
        (4, 4)
    """
    if len(_held(model, name)) != before:
        return []
    return [Growth(model, n, rows) for n in (name, *beside(model, name))]


def beside(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return what else has a row or a number for every token of an embedding or head: what must grow with it.

    These are the other end of the vocabulary where the two are not tied, the head's bias, and biases that stand
    beside the head (BERT's `cls.predictions.bias`, the buffer `final_logits_bias` of BART and Marian).

    Args:
        model: the model.
        name: the parameter.

    Returns:
        First names and tensors, [tokens, ...] or [1, tokens].

    Example:
        >>> net = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4))
        >>> net[1].weight = net[0].weight
        >>> list(beside(net, "0.weight"))
        ['1.bias']
    """
    found, (entry, head) = Parameters.of(model), _ends(model)
    first, tokens = found.alias.get(name, name), len(_held(model, name))
    owners = {n.rpartition(".")[0] for n in [name, *(found.tied(name) if name in found.alias else ())]}
    one = getattr(_text_config(model), "share_encoder_decoder_embeddings", True)  # vocabulary, in and out
    if one and owners & {entry, head}:
        owners |= {n for n in (entry, head) if n is not None}
    around = {head.rpartition(".")[0]} if head in owners and head else set()
    beside: dict[str, Tensor] = {}
    for prefix in sorted(owners | around):
        module = model.get_submodule(prefix)
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            vector = tuple(tensor.shape) in ((tokens,), (1, tokens))
            matrix = prefix in owners and tensor.dim() > 1 and len(tensor) == tokens
            full = f"{prefix}.{leaf}" if prefix else leaf
            key = found.alias.get(full, full)
            if (vector or matrix) and key != first:
                beside[key] = tensor
    return beside


def _held(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    held: Tensor = getattr(model.get_submodule(owner), leaf)
    return held


def _text_config(model: nn.Module) -> object:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _ends(model: nn.Module) -> tuple[str | None, str | None]:
    """Return the names of what a transformers model calls its embedding and its head; None where it has none."""
    paths = {id(m): n for n, m in model.named_modules()}
    found: list[str | None] = []
    for way in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(paths.get(id(getattr(model, way)())))
        except (AttributeError, NotImplementedError):
            found.append(None)
    return found[0], found[1]
