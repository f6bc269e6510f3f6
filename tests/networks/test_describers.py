"""Describers of very few pictures: one has no spread, and that is no reason for numbers that are none."""

import pytest

from neurograft.networks.captioner import captioner
from neurograft.networks.word_scorer import word_scorer
from neurograft.worlds.scenes import scenes


@pytest.mark.parametrize("made", [word_scorer, lambda pairs: captioner(pairs, hidden=4, epochs=1)])
def test_one_described_picture_is_enough_for_finite_numbers(made):
    found = made(scenes(count=1, k=1, size=8))
    assert all(value.isfinite().all() for value in found.state_dict().values())
