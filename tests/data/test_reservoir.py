"""The buffer between a stream and its repairs: what it keeps, and rows of several lengths as one batch."""

from collections import Counter

import pytest
import torch

from neurograft.core.context import Phase
from neurograft.core.errors import RequestError
from neurograft.data.reservoir import Replay, reservoir

REPAIR = Phase(stage="repair:0")


def rows(length, mask=True):
    tokens = torch.arange(3, 3 + length).repeat(2, 1)
    made = {"input_ids": tokens, "labels": tokens.clone(), "attention_mask": torch.ones_like(tokens)}
    return made if mask else {"input_ids": tokens}


def test_every_example_is_kept_with_the_same_chance():
    counts = Counter(x for seed in range(600) for x in reservoir(range(12), size=3, seed=seed))
    assert all(abs(counts[x] - 150) < 50 for x in range(12))  # 4.7 standard deviations


def test_rows_of_several_lengths_are_one_batch():
    feed = Replay([rows(5), rows(7)], size=10, batch=4)
    for draw in range(2):
        feed(draw, Phase())
    found = feed(2, REPAIR)
    short = found["attention_mask"].sum(1) == 5
    assert found["input_ids"].shape == (4, 7)
    assert short.tolist().count(True) == 2
    assert found["labels"][short][:, 5:].eq(-100).all()
    assert not found["input_ids"][short][:, 5:].any()
    for length, chosen in ((5, short), (7, ~short)):
        for name, expected in rows(length).items():
            assert torch.equal(found[name][chosen][:, :length], expected)


def test_lengths_that_nothing_tells_are_refused():
    feed = Replay([rows(5, mask=False), rows(7, mask=False)], size=10, batch=4)
    for draw in range(2):
        feed(draw, Phase())
    with pytest.raises(RequestError, match="without an attention_mask"):
        feed(2, REPAIR)
    with pytest.raises(RequestError, match="has ended"):
        feed(3, Phase())
