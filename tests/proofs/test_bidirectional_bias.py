"""Bi-directional bias: attributions add up, a planted preference is one channel, pinning it makes the model fair."""

import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.audits.stereotype import stereotype
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.prompts.candidates import divergence, entropy
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.units import Site, Tap
from neurograft.locators.cue_bias import cue_bias
from neurograft.pipeline.run import run
from neurograft.worlds.planted import ALWAYS, SEEN, planted
from tests.proofs import bar, note, patched
from tests.proofs._spoilt import without_the_activation
from tests.proofs._tools import Says, moved, snapshot

PAPER, SCALE = "bidirectional-bias", "tiny"


@contextmanager
def the_path_forgets_the_activation():
    """Gradients along the path are not multiplied with what they are gradients of."""
    with without_the_activation("neurograft.locators.cue_bias"):
        yield


@contextmanager
def variants_are_not_compared():
    """The backward score looks at each variant alone: how sure it is, not how it differs from the others."""
    with patched("neurograft.locators.cue_bias", "divergence", lambda logits: entropy(logits).mean(-1)):
        yield


@contextmanager
def the_least_biased_channels_are_pinned():
    """The lowest scores are taken instead of the highest."""
    plain = resolve("neurograft.selectors.top.joined")
    with patched("neurograft.selectors.top", "joined", lambda scores: -plain(scores)):
        yield


BROKEN = (the_path_forgets_the_activation, variants_are_not_compared, the_least_biased_channels_are_pinned)


class Head(nn.Module):
    """A bias-free head on 12 channels, and nothing before it."""

    def __init__(self, seed):
        super().__init__()
        rng = generator(seed, "head")
        self.tap, self.lm_head = nn.Identity(), nn.Linear(12, 5, bias=False)
        self.lm_head.weight.data = torch.randn(5, 12, generator=rng)

    def forward(self, inputs_embeds, labels=None):
        return SimpleNamespace(logits=self.lm_head(self.tap(inputs_embeds)))


SITE = {"head": Site("head", "column", 12, tap=Tap("tap"))}


def question(seed):
    h = torch.randn(1, 1, 12, generator=generator(seed, "state")) * 0.7
    return {"inputs_embeds": torch.cat([h, h], 1), "labels": torch.tensor([[-100, 2]])}, h[0, 0]


def test_forward_scores_add_up_to_the_rise_from_indifference():
    gaps, inclusive = [], []
    for seed in range(5):
        model, (batch, h) = Head(seed), question(seed)
        p = (model.lm_head.weight.detach() @ h)[[0, 2, 3]].softmax(0)
        due = float(1 / -(p * p.log()).sum() - 1 / math.log(3))
        for rule, into in (("midpoint", gaps), ("inclusive", inclusive)):
            found = cue_bias(Context(model, SITE, [batch]), candidates=[0, 2, 3], rule=rule)
            into.append(abs(float(found.values["head"].sum()) - due) / due)
    bar("completeness error of 20 midpoints, relative", gaps, at_most=0.01)
    assert sum(inclusive) > 3 * sum(gaps)
    note(inclusive=inclusive)


def test_each_score_is_the_mean_gradient_times_the_state():
    model, (batch, h) = Head(0), question(0)
    found = cue_bias(Context(model, SITE, [batch]), candidates=[1, 4], steps=4).values["head"]
    literal = torch.zeros(12)
    for alpha in (0.125, 0.375, 0.625, 0.875):
        x = (alpha * h).requires_grad_(True)
        p = (model.lm_head.weight.detach() @ x)[[1, 4]].softmax(0)
        (1 / (-(p * p.log()).sum() + 1e-12)).backward()
        literal += h * x.grad / 4
    torch.testing.assert_close(found, literal, rtol=1e-4, atol=1e-6)


def test_divergence_by_hand():
    even = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    assert float(divergence(even)) == pytest.approx(0.0, abs=1e-7)
    q = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert float(divergence(q.log())) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    three = torch.eye(3).clamp(min=1e-12).log()
    assert float(divergence(three)) == pytest.approx(math.log(3), abs=1e-6)


HE, SHE, HERS, HIS = 11, 12, 20, 21


def biased(seed):
    """A decoder whose head prefers HE through the channel that is always on, and which reads groups from another."""
    made = planted(per_layer=1, decoys=0, seed=seed)
    with torch.no_grad():
        head, words = made.model.lm_head.weight, made.model.model.embed_tokens.weight
        head[SHE] = head[HE]
        head[HE, ALWAYS] += 2.0
        words[HERS, SEEN], words[HIS, SEEN] = 3.0, -3.0
    return made.model


def prompts(seed, *, groups=False, count=16):
    """Rows of random tokens that are answered by HE and by SHE, or end in each group's word, two of each prompt."""
    tokens = torch.randint(30, 64, (count, 7), generator=generator(seed, "prompts")).repeat_interleave(2, 0)
    if groups:
        tokens[0::2, -2], tokens[1::2, -2] = HERS, HIS
    tokens[0::2, -1], tokens[1::2, -1] = HE, SHE
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def preference(model, batch):
    with torch.no_grad():
        return model(**batch).logits[:, -2][:, [HE, SHE]].softmax(-1)[:, 0]


def test_a_planted_preference_is_one_channel_and_pinning_it_is_fair():
    fair, biassed, random = [], [], []
    for seed in range(3):
        model, batch, test = biased(seed), prompts(seed), prompts(100 + seed)
        before = snapshot(model)
        out = run("bidirectional_bias", model, [batch], changes={"beta": 1 / 32}, seed=seed)
        assert out.where.ids == {"model.norm/norm": torch.tensor([ALWAYS])}
        assert not out.graft.deltas
        assert len(out.graft.operations) == 1
        biassed.append(float(preference(model, test).mean()))
        with torch.no_grad():
            base = model(**test).logits[:, -2]
            with out.graft.on(model):
                fair.append(float((preference(model, test) - 0.5).abs().max()))
                pinned = model(**test).logits[:, -2]
        others = [t for t in range(64) if t not in (HE, SHE)]
        assert torch.equal(pinned[:, others].argsort(-1), base[:, others].argsort(-1))
        drawn = run("bidirectional_bias", model, [batch], changes={"beta": 1 / 32, "select.by": "random"}, seed=seed)
        with drawn.graft.on(model):
            random.append(float((preference(model, test) - 0.5).abs().mean()))
        assert not moved(before, model)
    bar("distance of p from one half with the channel pinned to 0", fair, at_most=0.01)
    bar("distance of p from one half with a random channel pinned", random, at_least=0.2)
    assert min(biassed) > 0.8


def test_backward_finds_the_channel_that_tells_the_groups_apart():
    for seed in range(3):
        model = biased(seed)
        with torch.no_grad():
            model.lm_head.weight[HE, [SEEN, ALWAYS]] = torch.tensor([0.5, 0.0])
            model.lm_head.weight[SHE, SEEN] = -0.5
        batch = prompts(seed, groups=True)
        where = sites(model, "norm")
        how = {"candidates": [HE, SHE], "direction": "backward", "last": True, "temperature": 1.0}
        found = cue_bias(Context(model, where, [batch]), **how)
        assert list(found.values) == ["model.norm/norm"]
        assert int(found.values["model.norm/norm"].argmax()) == SEEN
        assert found.card["completeness_error"] < 0.05


def test_stereotype_scores_by_hand():
    told = torch.full((6, 2, 8), 0.0)
    # Prompt 1: stereotype 3 > opposite 2 > nonsense 1; prompt 2: nonsense 3 > opposite 2 > stereotype 1.
    for row, logit in enumerate([3.0, 2.0, 1.0, 1.0, 2.0, 3.0]):
        told[row, 0, 5] = logit
    labels = torch.tensor([[-100, 5]] * 6)
    found = stereotype(Says(told), [{"input_ids": labels.clamp(min=0), "labels": labels}])
    assert (found["lms"], found["ss"], found["icat"], found["prompts"]) == (50.0, 50.0, 50.0, 2)
    one = stereotype(Says(told[:3]), [{"input_ids": labels[:3].clamp(min=0), "labels": labels[:3]}], candidates=[5, 6])
    assert (one["lms"], one["ss"], one["icat"]) == (100.0, 100.0, 0.0)
    p = 1 / (1 + math.exp(-3.0))
    assert one["entropy"] == pytest.approx([-p * math.log(p) - (1 - p) * math.log(1 - p)], abs=1e-5)
    json.dumps(one)


def test_what_cannot_be_attributed_is_said():
    model, (batch, _) = Head(0), question(0)
    with pytest.raises(RequestError, match="at least two different tokens"):
        cue_bias(Context(model, SITE, [batch]))
    with pytest.raises(RequestError, match="variants"):
        cue_bias(Context(model, SITE, [batch]), candidates=[0, 1], direction="backward")
    with pytest.raises(RequestError, match="no tokenizer"):
        cue_bias(Context(model, SITE, [batch]), candidates=["he", "she"])
    with pytest.raises(RequestError, match="labelled answer"):
        cue_bias(Context(model, SITE, [{"inputs_embeds": batch["inputs_embeds"]}]), candidates=[0, 1])
    with pytest.raises(RequestError, match="in threes"):
        stereotype(model, [batch])
