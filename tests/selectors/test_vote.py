"""Votes: ties, however many units and ballots there are."""

import torch

from neurograft.core.selection import Scores
from neurograft.core.units import Site
from neurograft.selectors.vote import vote


def test_ties_go_to_the_better_mean_and_then_to_the_lower_number():
    site = {"a": Site("a", "row", 6)}
    each = torch.tensor([[9.0, 8.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 7.0, 7.0, 0.0]])
    scores = Scores(site, {"a": torch.tensor([0.0, 0.0, 0.0, 3.0, 3.0, 0.0])}, {}, {"a": each})
    assert vote(scores, count=2).ids["a"].tolist() == [3, 4]
    level = Scores(site, {"a": torch.zeros(6)}, {}, {"a": each})
    assert vote(level, count=2).ids["a"].tolist() == [0, 1]


def test_ties_are_told_apart_beside_many_votes():
    n = 70000
    site = {"a": Site("a", "row", n)}
    ballot = torch.zeros(n)
    ballot[[5, 6, 7]] = 1.0
    mean = torch.zeros(n)
    mean[[6, 7]] = torch.tensor([2e-6, 1e-6])
    many = [Scores(site, {"a": ballot})] * 40
    assert vote(Scores(site, {"a": mean}), ballots=many, count=3).ids["a"].tolist() == [5, 6, 7]
    uneven = [Scores(site, {"a": ballot.roll(i % 2)}) for i in range(40)]  # 5 to 7 and 6 to 8 by turns
    assert vote(Scores(site, {"a": mean}), ballots=uneven, count=3).ids["a"].tolist() == [5, 6, 7]
