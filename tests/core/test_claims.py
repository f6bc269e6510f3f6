"""Who says that a model is being trained, and who may take it back."""

import copy
import pickle

import pytest
from torch import nn

from neurograft.core.compact.values import check_free, claim, disclaim
from neurograft.core.errors import RunError


class Holder:
    """Stands for an attachment."""


def test_only_the_one_who_claimed_a_model_takes_the_claim_back():
    net, one, other = nn.Sequential(nn.Linear(2, 2)), Holder(), Holder()
    claim(net, one)
    disclaim(net, other)
    with pytest.raises(RunError, match="another attachment"):
        check_free(net, other)
    check_free(net, one)
    disclaim(net, one)
    check_free(net)


def test_copies_and_what_nobody_holds_any_more_are_free():
    net, one = nn.Sequential(nn.Linear(2, 2)), Holder()
    claim(net, one)
    for free in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        check_free(free)
    with pytest.raises(RunError, match="another attachment"):
        check_free(net)
    del one
    check_free(net)
