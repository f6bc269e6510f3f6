"""Log-probabilities of labels in pieces: the numbers of the plain formula, and far less memory."""

import pytest
import torch
import torch.nn.functional as F

from neurograft.core import likelihood
from neurograft.core.compact.meter import Peak, saved
from neurograft.core.likelihood import label_log_probs
from neurograft.core.step import Step
from neurograft.objectives.likelihood import likelihood as objective
from neurograft.worlds.pico import pico


def plain(logits, at, labels):
    chosen = logits[at]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    return -F.cross_entropy(chosen, labels, reduction="none")


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_the_plain_formulas(monkeypatch, dtype, share):
    monkeypatch.setattr(likelihood, "CHUNK", 50)  # 7 places at a time
    rng = torch.Generator().manual_seed(0)
    at = torch.randperm(40, generator=rng)[: int(40 * share)]
    labels, weights = torch.randint(7, (len(at),), generator=rng), torch.randn(len(at), generator=rng)
    data = 3 * torch.randn(40, 7, generator=rng)
    found = []
    for log_probs in (plain, label_log_probs):
        logits = data.to(dtype).requires_grad_(True)
        told = log_probs(2 * logits, at, labels)  # no leaf, so that what is kept is the graph's own
        (told * weights).sum().backward()
        found.append((told.detach(), logits.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=3e-7 if dtype != torch.bfloat16 else 0.02)
    off = torch.ones(40, dtype=torch.bool)
    off[at] = False
    assert not found[1][1][off].any()


def test_gradient_by_differences():
    logits, at, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([4, 0, 2]), torch.tensor([1, 1, 0])
    assert torch.autograd.gradcheck(lambda x: label_log_probs(x, at, labels), logits.requires_grad_(True))


@pytest.mark.parametrize(
    ("dtype", "first", "kept", "most"),
    [(torch.float32, 0, 1.1, 2.4), (torch.float32, 48, 0.4, 1.6), (torch.bfloat16, 0, 0.6, 1.4)],
)
def test_a_step_holds_the_logits_and_their_gradient_and_little_else(monkeypatch, dtype, first, kept, most):
    """In units of a float32 [B, T, V]; a copy of the chosen logits and their softmax would be two more."""
    monkeypatch.setattr(likelihood, "CHUNK", 1 << 16)
    model = pico("llama", vocab_size=8000, dtype=dtype).requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    tokens = torch.randint(3, 8000, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :first] = -100
    batch, unit = {"input_ids": tokens, "labels": labels}, 2 * 64 * 8000 * 4
    with saved(model) as meter:
        loss = objective(Step(model, batch))
    assert meter.bytes < kept * unit
    del loss
    with Peak() as peak:
        objective(Step(model, batch)).backward()
    assert peak.peak < most * unit
    with torch.no_grad(), Peak() as peak:
        objective(Step(model, batch))
    assert peak.peak < (1.3 if dtype == torch.float32 else 0.8) * unit
