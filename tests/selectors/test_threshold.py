"""A bar with a least and a most."""

import torch

from neurograft.core.selection import Scores
from neurograft.core.units import Site
from neurograft.selectors.threshold import threshold


def test_of_those_that_pass_the_highest_are_taken_ties_by_number():
    sites = {"a": Site("a", "row", 3), "b": Site("b", "row", 2)}
    scores = Scores(sites, {"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.tensor([3.0, 2.0])})
    found = threshold(scores, above=1.5, most=3)
    assert {n: i.tolist() for n, i in found.ids.items()} == {"a": [1, 2], "b": [0]}
    assert (found.card["passed"], found.card["most"]) == (4, 3)
    assert "most" not in threshold(scores, above=1.5, most=4).card
    assert threshold(scores, above=5.0, least=1, most=3).ids["a"].tolist() == [1]
