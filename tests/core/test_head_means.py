"""Mean head outputs by distance from the end."""

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.taps.head_means import Means
from neurograft.core.units import Site, Tap
from neurograft.worlds.pico import pico

HEADS = {"h": Site("h", "head", 4, tap=Tap("model.layers.1.self_attn.o_proj", "input", width=8, stride=8), layer=1)}


def batch(rows, attention=None):
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids) if attention is None else torch.tensor(attention),
    }


def test_padding_on_either_side_counts_for_nothing():
    model = pico("llama").eval()
    apart = Means.of(model, HEADS, [batch([[5, 6]]), batch([[7, 8, 9, 10]])]).values["h"]
    left = batch([[0, 0, 5, 6], [7, 8, 9, 10]], [[0, 0, 1, 1], [1, 1, 1, 1]])
    right = batch([[5, 6, 0, 0], [7, 8, 9, 10]], [[1, 1, 0, 0], [1, 1, 1, 1]])
    for together in (left, right):
        means = Means.of(model, HEADS, [together])
        torch.testing.assert_close(means.values["h"], apart, rtol=0, atol=1e-6)
    assert torch.equal(means.at("h", batch([[0, 0, 0, 3, 4]], [[0, 0, 0, 1, 1]]))[0, 3:], means.values["h"][[1, 0]])
    with pytest.raises(RequestError, match="a prompt of 5 tokens"):
        means.at("h", batch([[1, 2, 3, 4, 5]]))
