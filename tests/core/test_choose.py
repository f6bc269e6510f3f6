"""Choices of method: what is no choice says so."""

import pytest
import torch

from neurograft.core.choose import choose
from neurograft.core.errors import RequestError
from neurograft.core.selection import Scores
from neurograft.core.units import Site


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({}, "a name, "),
        ({"options": {}}, "a name, "),
        (("top", 0.01), "options of type float"),
        (("top", None), "options of type NoneType"),
        ({"path": "top", "options": 3}, "options of type int"),
        (("top", {"fractoin": 0.01}), "did you mean 'fraction'"),
        (("top", {"fraction": "much"}), "fraction='much' of .*a number"),
        (("random", {"seed": "abc"}), "a whole number"),
    ],
)
def test_what_is_no_choice_is_refused(choice, words):
    with pytest.raises(RequestError, match=words):
        choose("selectors", choice)


def test_more_options_of_a_chosen_method_are_checked_too():
    chosen = choose("selectors", "top")
    assert choose("selectors", chosen, count=3).options == {"count": 3}
    with pytest.raises(RequestError, match="'fraction'"):
        choose("selectors", chosen, fractoin=0.1)


def test_an_option_without_a_default_has_to_be_given():
    scores = Scores({"a": Site("a", "row", 2)}, {"a": torch.ones(2)})
    with pytest.raises(RequestError, match=r'quantile without q.*\("quantile", \{"q": \.\.\.\}\)'):
        choose("selectors", "quantile")(scores)
    assert len(choose("selectors", "quantile", q=0.5)(scores)) == 2


def test_rooms_whose_name_is_no_plural():
    with pytest.raises(RequestError, match="a method of data 'reservoor'"):
        choose("data", "reservoor")
    with pytest.raises(RequestError, match=r"got locator 'fischer'.*did you mean 'fisher'"):
        choose("locators", "fischer")
