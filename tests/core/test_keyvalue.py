"""Answers of the key-value family against what defines them."""

import torch

from neurograft.core.numerics.keyvalue import answers
from neurograft.core.seeds import generator

KEYS = torch.randn(3, 5, generator=generator(0, "keys"), dtype=torch.float64)
INSIDE = torch.tensor([True, False, True, True, True])


def test_exact_answers_meet_every_residual():
    for how in ({}, {"ridge": 0.5}, {"covariance": KEYS.T @ KEYS + torch.eye(5), "weight": 2.0}):
        torch.testing.assert_close(KEYS @ answers(KEYS, exact=True, **how).T, torch.eye(3, dtype=torch.float64))


def test_a_mask_holds_while_solving_or_afterwards():
    post, solved = (answers(KEYS, ridge=1.0, mask=INSIDE, masked=m) for m in ("post", "solve"))
    assert torch.equal(post, answers(KEYS, ridge=1.0) * INSIDE)
    assert torch.equal(solved[:, INSIDE], answers(KEYS[:, INSIDE], ridge=1.0))
    assert not solved[:, ~INSIDE].any()
