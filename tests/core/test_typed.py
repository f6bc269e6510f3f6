"""Options of another type are refused by name, everywhere methods and recipes are chosen."""

import functools
import sys

import pytest
import torch

import neurograft as ng
from neurograft.core.choose import check_options, choose
from neurograft.core.typed import annotations_of
from neurograft.train.optimizers import chosen


def asks(context, *, steps: int = 1):
    """A foreign function."""


class Asks:
    """An object that is called."""

    steps: str  # of the object, not of its call

    def __call__(self, context, *, steps: int = 1):
        """As above."""


def in_other_words(context, where, lr: "how fast it goes"):  # noqa: F722
    """A foreign function whose annotations are no types."""


WRONG = [
    (lambda: ng.recipe("nmke", layers=0), r"layers=0 .*write layers=\[0\]"),
    (lambda: ng.recipe("nmke", layers=["a"]), "layers="),
    (lambda: ng.recipe("nmke", steps="two"), "steps='two'.*a whole number"),
    (lambda: ng.recipe("nmke", batch=1.5), "batch=1.5"),
    (lambda: ng.recipe("nmke", lr=None), "lr=None.*a number"),
    (lambda: choose("edits", ("locft_bf", {"lr": "fast"})), "lr='fast'"),
    (lambda: choose("edits", choose("edits", "shut"), layers=[0]), "layers"),
    (lambda: chosen(("SGD", {"momentum": "much"})), "momentum='much' of SGD.*a number"),
    (lambda: check_options(functools.partial(asks, 1), {"steps": 1.5}, "asks"), "steps=1.5 of asks.*a whole number"),
    (lambda: check_options(Asks(), {"steps": 1.5}, "asks"), "steps=1.5 of asks"),
]
FINE = [
    lambda: ng.recipe("nmke", layers=(0, 1), null=None, lr=1),
    lambda: ng.recipe("milan", query="word"),
    lambda: choose("edits", ("remove_components", {"numbers": torch.arange(2)})),
    lambda: choose("edits", lambda context, where, lr: None),
    lambda: choose("edits", in_other_words, lr="fast"),
    lambda: chosen(("Adam", {"lr": torch.tensor(0.1), "betas": (0.9, 0.99), "foreach": None})),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_value_of_another_type_is_named(case):
    make, words = WRONG[case]
    with pytest.raises(ng.RequestError, match=words):
        make()


@pytest.mark.parametrize("case", range(len(FINE)))
def test_what_a_function_can_take_it_gets(case):
    assert FINE[case]()


def test_an_annotation_of_ours_that_cannot_be_read_is_no_licence(monkeypatch):
    assert annotations_of(in_other_words) == {}
    shut = choose("edits", "shut").function
    monkeypatch.delattr(sys.modules[shut.__module__], "Context")
    with pytest.raises(NameError):
        annotations_of(shut)
