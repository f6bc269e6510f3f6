"""Options of another type are refused by name, everywhere methods and recipes are chosen."""

import pytest
import torch

import neurograft as ng
from neurograft.core.choose import choose

WRONG = [
    (lambda: ng.recipe("nmke", layers=0), r"layers=0 .*write layers=\[0\]"),
    (lambda: ng.recipe("nmke", layers=["a"]), "layers="),
    (lambda: ng.recipe("nmke", steps="two"), "steps='two'"),
    (lambda: ng.recipe("nmke", batch=1.5), "batch=1.5"),
    (lambda: ng.recipe("nmke", lr=None), "lr=None"),
    (lambda: choose("edits", ("locft_bf", {"lr": "fast"})), "lr='fast'"),
    (lambda: choose("edits", choose("edits", "shut"), layers=[0]), "layers"),
]
FINE = [
    lambda: ng.recipe("nmke", layers=(0, 1), null=None, lr=1),
    lambda: ng.recipe("milan", query="word"),
    lambda: choose("edits", ("remove_components", {"numbers": torch.arange(2)})),
    lambda: choose("edits", lambda context, where, lr: None),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_value_of_another_type_is_named(case):
    make, words = WRONG[case]
    with pytest.raises(ng.RequestError, match=words):
        make()


@pytest.mark.parametrize("case", range(len(FINE)))
def test_what_a_function_can_take_it_gets(case):
    assert FINE[case]()
