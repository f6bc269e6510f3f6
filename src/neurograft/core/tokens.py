"""Rows for new tokens: a vocabulary that grows for as long as a graft is on."""

from __future__ import annotations

import torch
from torch import nn

from neurograft.core.units import Parameters


class Growth:
    """Rows of zeros appended to a parameter under all of its names, and the way back.

    Args:
        model: the model.
        name: the parameter, an embedding or a head.
        rows: how many rows it is to have.
    """

    def __init__(self, model: nn.Module, name: str, rows: int) -> None:
        found = Parameters.of(model)
        first = found.alias[name]
        self.model, self.old = model, found.by_name[first]
        self.names = [n for n, key in found.alias.items() if key == first]
        self.sizes: list[tuple[object, str, int]] = []
        added = torch.zeros(rows - len(self.old), *self.old.shape[1:], dtype=self.old.dtype, device=self.old.device)
        new = nn.Parameter(torch.cat([self.old.detach(), added]), requires_grad=self.old.requires_grad)
        self._place(new)
        for owner in [model.get_submodule(n.rpartition(".")[0]) for n in self.names]:
            for size in ("num_embeddings", "out_features"):
                self._resize(owner, size, rows)
        config = getattr(model, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            self._resize(config.get_text_config(), "vocab_size", rows)

    def _place(self, parameter: nn.Parameter) -> None:
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[leaf] = parameter

    def _resize(self, owner: object, size: str, rows: int) -> None:
        before = getattr(owner, size, None)
        if before == len(self.old):
            self.sizes.append((owner, size, before))
            setattr(owner, size, rows)

    def remove(self) -> None:
        """Put the parameter and the sizes back, with what the shared rows hold now, as and where the model is now."""
        now = self.model.get_parameter(self.names[0]).detach()[: len(self.old)]
        if (now.dtype, now.device) == (self.old.dtype, self.old.device):
            self.old.data.copy_(now)
        else:
            self.old.data = now.clone()
        self._place(self.old)
        for owner, size, before in self.sizes:
            setattr(owner, size, before)


def grown(model: nn.Module, name: str, before: int, rows: int) -> Growth | None:
    """Append rows if the parameter has just the base's number of them; None if it has them already.

    Example:
        >>> net = nn.Sequential(nn.Embedding(4, 2))
        >>> growth = grown(net, "0.weight", 4, 6)
        >>> tuple(net[0](torch.tensor([5])).shape), net[0].num_embeddings
        ((1, 2), 6)
        >>> growth.remove()
        >>> net[0].num_embeddings
        4
    """
    return Growth(model, name, rows) if len(model.get_parameter(name)) == before else None
