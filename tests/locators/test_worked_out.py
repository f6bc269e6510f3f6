"""Locators that learn or describe, against numbers worked out on paper; and what they refuse."""

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.units import Part, Site, Tap
from neurograft.locators.dcm import dcm
from neurograft.locators.described import described
from neurograft.locators.fisher import fisher
from neurograft.locators.gradient import gradient
from neurograft.locators.integrated_gradients import integrated_gradients
from neurograft.locators.rehearsed import rehearsed
from neurograft.locators.spared import spared
from neurograft.worlds.pico import pico, pico_batch

WORTH = torch.tensor([0.8, 0.4, 0.2, -1.0])


class SumsForCausalLM(nn.Module):
    """Four heads that carry the token's number; the logit of token 2 is WORTH . heads, all others are 0."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Identity()

    def forward(self, input_ids, labels=None):
        told = self.heads(input_ids[..., None].float().expand(-1, -1, 4)) @ WORTH
        return type("Out", (), {"logits": torch.stack([told * 0, told * 0, told], -1)})()


def prompts(token, rows):
    return {
        "input_ids": torch.tensor([[token, 2]] * rows),
        "labels": torch.tensor([[-100, 2]] * rows),
    }


@pytest.mark.parametrize("rows", [1, 3])
def test_dcm_patches_a_head_exactly_where_it_gives_more_than_its_price(rows):
    """Base heads are 0, counterfactual ones 1: loss = sum over heads of (lam - worth) (1 - w).

    The slope at a head is worth - lam, whatever the rows and the other heads; Adam makes steps of lr along its sign.
    """
    site = {"h": Site("h", "head", 4, (), Tap("heads"))}
    given = Context(SumsForCausalLM(), site, [prompts(0, rows)], [prompts(1, rows)])
    for lam, chosen in ((0.5, [1, 0, 0, 0]), (0.3, [1, 1, 0, 0]), (0.1, [1, 1, 1, 0]), (1.0, [0, 0, 0, 0])):
        found = dcm(given, lam=lam, lr=0.1, epochs=3)
        assert found.values["h"].tolist() == pytest.approx([0.3 * c for c in chosen], abs=1e-5), lam
    # three steps leave every w above a half, so nothing is patched and token 0 is as likely
    assert dcm(given, lam=0.5, lr=0.1, epochs=3).card["accuracy"] == 0.0
    assert dcm(given, lam=0.5, lr=0.1, epochs=6).card["accuracy"] == 1.0


class Fixed:
    """Says "alpha" before "beta" of a unit that is active at one place, the other way round of any other."""

    identity = "fixed"

    def propose(self, shown, *, beam, length):
        rare = int(shown.masks.sum()) == 1
        return [("alpha", -1.0), ("beta", -1.5)] if rare else [("beta", -2.0), ("alpha", -2.5)]

    def prior(self, texts):
        return torch.tensor([{"alpha": -2.0, "beta": -6.0}[t] for t in texts], dtype=torch.float64)


class Marked(nn.Module):
    """Unit 0 is active at token 5, unit 1 at tokens 5 and 6 alike."""

    def __init__(self):
        super().__init__()
        self.mid = nn.Identity()

    def forward(self, input_ids):
        return self.mid(torch.stack([input_ids == 5, input_ids >= 5], -1).float())


def test_described_scores_by_weighted_information_with_and_without_a_query():
    site = {"u": Site("u", "neuron", 2, (), Tap("mid"))}
    given = Context(Marked(), site, [{"input_ids": torch.tensor([[1, 5, 2, 6, 3, 4, 1, 2]])}])

    def scores(**options):
        found = described(given, describer=Fixed(), k=1, quantile=0.7, **options)
        assert found.card["descriptions"]["u"] == ["beta", "beta"]
        return found.values["u"].tolist()

    # log p(d | E) - 0.2 log p(d): alpha -0.6 and beta -0.3; beta -0.8 and alpha -2.1
    assert scores() == pytest.approx([-0.3, -0.8])
    assert scores(query="alpha") == pytest.approx([-0.3, -1.3])
    assert scores(query=["BETA"]) == pytest.approx([0.3, 1.3])
    # all of the beam fits: the other sort counts 1 below its worst; nothing fits: the query does
    assert scores(query=["alpha", "beta"]) == pytest.approx([-0.3 + 1.6, -0.8 + 3.1])
    assert scores(query="gamma") == pytest.approx([-1.6 + 0.3, -3.1 + 0.8])


def test_experts_without_a_token_and_the_two_sides_of_images_with_texts_are_described():
    model = pico("mixtral")
    found = described(Context(model, sites(model, "neuron"), [{"input_ids": torch.tensor([[7]])}]))
    assert "" in [text for texts in found.card["descriptions"].values() for text in texts]
    model = pico("clip")
    given = Context(model, sites(model, "neuron"), [pico_batch(model, batch=4)])
    found = described(given, k=2)
    assert len(found.card["describer"]) == 2


def test_a_rehearsal_does_not_begin_with_gradients_that_lay_around_and_leaves_them():
    model = pico("bert")
    given = Context(model, sites(model, "module"), [pico_batch(model)], loss=lambda m, b: m(**b).loss)
    plain = rehearsed(given, steps=3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    again = rehearsed(given, steps=3)
    assert all(torch.equal(again.values[n], v) for n, v in plain.values.items())
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())


def test_gradients_are_those_of_the_mean_over_examples_also_of_uneven_batches():
    net = nn.Linear(1, 1, bias=False)
    site = {"w": Site("w", "row", 1, (Part.rows("weight", (1, 1)),))}
    x = torch.tensor([[1.0], [2.0], [6.0]])
    for cut in ([x], [x[:1], x[1:]], [x[:2], x[2:]]):
        given = Context(net, site, [{"input": b} for b in cut], target=lambda out, batch: out.mean())
        for score in ("abs_mean", "mean_abs", "l1", "l2"):
            (value,) = gradient(given, score=score).values.values()
            assert value.tolist() == pytest.approx([3.0]), score


def test_numbers_of_nothing_are_refused():
    net = pico("llama")
    given = Context(net, sites(net, "neuron"), [pico_batch(net)], loss=lambda m, b: m(**b).loss)
    for rule, steps in (("midpoint", 0), ("trapezoid", 1), ("inclusive", 1)):
        with pytest.raises(RequestError, match="at least"):
            integrated_gradients(given, rule=rule, steps=steps)
    for locator in (fisher, spared):
        with pytest.raises(RequestError, match="limit=0"):
            locator(given, limit=0)
