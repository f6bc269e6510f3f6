"""A block leaves a model as it found it, whatever a trainer does to it meanwhile."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from neurograft.train.untouched import untouched
from neurograft.worlds.pico import pico


class Odd(nn.Module):
    """A module with containers of its own, which others hold on to."""

    def __init__(self):
        super().__init__()
        self.order, self.list, self.set = {"a": 1, "b": 2}, [1, 2], {1}
        self.only, self.pair = {"a": None}, [None, None]
        self.register_buffer("count", torch.zeros(2))


def test_containers_come_back_as_they_were_and_stay_the_same_objects():
    odd, handles = Odd(), []
    order, lists, sets = odd.order, odd.list, odd.set

    def interrupted():
        with untouched(odd):
            order["a"], odd.extra = order.pop("a"), 1  # another order
            lists.append(3)
            sets.add(2)
            odd.only["a"], odd.pair[:] = 1, [1, 2]  # every value another, the keys and the length as before
            odd.order = {}
            odd.count += 1
            handles.append(odd.register_forward_hook(print))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert odd.order is order
    assert (list(order), lists, sets, odd.count.tolist()) == (["a", "b"], [1, 2], {1}, [0.0, 0.0])
    assert (odd.only, odd.pair) == ({"a": None}, [None, None])
    assert not hasattr(odd, "extra")
    assert not odd._forward_hooks
    handles[0].remove()  # it finds its dict, though emptied


def test_configs_modes_and_random_states_come_back():
    net = pico("llama").train()
    net.model.eval()
    net.config.use_cache = True

    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = drawn()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    with untouched(net):
        net.config.use_cache = False
        net.train()
        drawn()
    assert drawn() == expected
    assert net.config.use_cache
    assert (net.training, net.model.training, net.model.layers[0].training) == (True, False, False)
