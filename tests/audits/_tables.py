"""Models that can be worked out on paper: their logits are rows of one table."""

from types import SimpleNamespace

import torch
from torch import nn

from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region


class Table(nn.Module):
    """A classifier: item r has the logits weight[r]."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32).clone())

    def forward(self, rows):
        return self.weight[rows]


class BigramForCausalLM(nn.Module):
    """A language model: behind token t come the logits weight[t]."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32).clone())

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.weight[input_ids])


def rows_graft(model, ids, values, name="weight"):
    weight = model.get_parameter(name)
    return Graft.made(model, {name: Slice(Region.of(weight.shape, "rows", ids), torch.as_tensor(values).float())})


TASK, A, B = range(4), range(4, 8), range(8, 12)


def target():
    """The true logits of three languages of four tokens each, which never mix."""
    rng = torch.Generator().manual_seed(3)
    logits = torch.full((12, 12), -30.0)
    for tokens in (TASK, A, B):
        for t in tokens:
            logits[t, tokens[0] : tokens[-1] + 1] = 2 * torch.randn(4, generator=rng)
    return logits


def text(tokens, items, seed, length=12):
    """Text drawn from the true language, as one batch."""
    rng, odds = torch.Generator().manual_seed(seed), target().softmax(-1)
    found = torch.randint(tokens[0], tokens[-1] + 1, (items, 1), generator=rng)
    for _ in range(length - 1):
        found = torch.cat([found, torch.multinomial(odds[found[:, -1]], 1, generator=rng)], 1)
    return [{"input_ids": half} for half in found.split(16)]
