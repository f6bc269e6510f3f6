"""What a verb that only looks leaves behind, also when it fails."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from neurograft.pipeline.state import as_found


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_modes_flags_gradients_and_random_states_come_back_after_a_failure():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    net(torch.ones(1, 2)).sum().backward()
    grad = net[0].weight.grad
    kept = grad.clone()
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    expected = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.random.set_rng_state(states[2])

    def failed():
        with as_found(net) as model:
            assert not any(m.training for m in model.modules())
            drawn()
            model[0].bias.requires_grad_(True)
            model[0].weight.grad = None
            model(torch.ones(1, 2)).sum().backward()
            model[1].train()
            raise KeyError

    with pytest.raises(KeyError):
        failed()
    assert drawn() == expected
    assert [m.training for m in net.modules()] == [True, True, False]
    assert (net[0].weight.requires_grad, net[0].bias.requires_grad) == (True, False)
    assert net[0].weight.grad is grad
    assert torch.equal(grad, kept)
    assert net[0].bias.grad is None
