"""Sparse reward: TD reaches the analytic values, and channels planted as value and as its error are told apart."""

import json
from contextlib import contextmanager

import pytest
import torch

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.core.context import IGNORE, Context
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.core.units import Site
from neurograft.locators._value import errors, fitted
from neurograft.locators.probe import probe
from neurograft.locators.value import rollouts, value
from neurograft.pipeline.run import run
from neurograft.worlds.planted import ALWAYS, SEEN, UNREAD, planted
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "sparse-reward", "tiny"


@contextmanager
def every_state_is_its_own_end():
    """Nothing is bootstrapped: states before the last are fitted to no reward at all."""
    plain = resolve("neurograft.locators.value.fitted")

    def alone(x, target, following, **how):
        return plain(x, target, None if following is None else torch.full_like(following, -1), **how)

    with patched("neurograft.locators.value", "fitted", alone), patched(__name__, "fitted", alone):
        yield


@contextmanager
def errors_stand_at_the_state_before():
    """A step's prediction error is read from the state it starts from."""
    plain = resolve("neurograft.locators.value.errors")

    def early(v, following, gamma):
        return plain(v, following, gamma)[0], (following >= 0).nonzero()[:, 0]

    with patched("neurograft.locators.value", "errors", early):
        yield


@contextmanager
def channels_are_ranked_by_their_size():
    """A channel's score is how large it is and not what the probe makes of it."""
    plain = resolve("neurograft.locators.value.scored")

    def sized(context, scores, card):
        states, _, _ = rollouts(context, ())
        return plain(context, {n: x.abs().mean(0) for n, x in states.items()}, card)

    with patched("neurograft.locators.value", "scored", sized):
        yield


BROKEN = (every_state_is_its_own_end, errors_stand_at_the_state_before, channels_are_ranked_by_their_size)


def walk(seed, episodes):
    """Return states [M, 5], targets and following states of random walks over 5 places that pay 1 on the right."""
    rng, at, target, following = generator(seed, "walk"), [], [], []
    for _ in range(episodes):
        place = 2
        while True:
            at.append(place)
            place += 1 if float(torch.rand((), generator=rng)) < 0.5 else -1
            over = place in (-1, 5)
            target.append(float(place == 5))
            following.append(-1 if over else len(at))
            if over:
                break
    return torch.eye(5)[at], torch.tensor(target), torch.tensor(following)


def walked(seed, episodes, epochs):
    x, target, following = walk(seed, episodes)
    how = {"hidden": 0, "gamma": 1.0, "epochs": epochs, "lr": 3e-2, "decay": 0.0, "rng": generator(seed, "fit")}
    return fitted(x, target, following, **how)(torch.eye(5))


def test_two_states_by_hand():
    """s_0 leads to s_1, which pays in 3 of 4 cases: V(s_1) = 3/4, and V(s_0) = gamma * 3/4 by bootstrap alone."""
    x = torch.eye(2).repeat(4, 1)
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    following = torch.tensor([1, -1, 3, -1, 5, -1, 7, -1])
    how = {"hidden": 0, "epochs": 800, "lr": 5e-2, "decay": 0.0, "rng": generator(0, "fit")}
    found = fitted(x, target, following, gamma=0.8, **how)(torch.eye(2))
    assert found.tolist() == pytest.approx([0.6, 0.75], abs=1e-2)
    delta, after = errors(torch.tensor([0.5, 0.9, 0.2, 0.1]), torch.tensor([1, 2, -1, -1]), 0.5)
    assert delta.tolist() == pytest.approx([0.5 * 0.9 - 0.5, 0.5 * 0.2 - 0.9])
    assert after.tolist() == [1, 2]


@effect
def test_temporal_differences_reach_the_values_of_the_random_walk():
    off = [float((walked(s, 6000, 500) - torch.arange(1, 6) / 6).abs().max()) for s in range(3)]
    bar("largest error of five values", off, at_most=0.02)


def world(seed, *, count=800, length=6, shuffled=False, held=False):
    """Return a decoder and rollouts whose state shows the chance of success and how it just changed.

    The chance p_t is a fair walk; one residual channel is p_t, another p_t - p_{t-1}, all others are noise, and the
    reward is drawn from the last p. Nothing in the model writes these channels.
    """
    model = planted(per_layer=1, decoys=0, seed=seed).model
    rng = generator(seed, "rollouts", held)
    x = torch.randn(count, length + 2, 32, generator=rng)
    p = torch.rand(count, 1, generator=rng) * 0.6 + 0.2
    chances = [p[:, 0]]
    for _ in range(length):
        reach = torch.minimum(chances[-1], 1 - chances[-1]).clamp(max=0.25)
        chances.append(chances[-1] + reach * (2 * torch.randint(0, 2, (count,), generator=rng) - 1))
    p = torch.stack(chances, 1)
    reward = torch.rand(count, generator=rng) < p[:, -1]
    change = torch.cat([torch.zeros(count, 1), p[:, 1:] - p[:, :-1]], 1)
    if shuffled:
        order = torch.stack([torch.randperm(length + 1, generator=rng) for _ in range(count)])
        p, change = p.gather(1, order), change.gather(1, order)
    x[:, 1:, UNREAD], x[:, 1:, SEEN] = 2 * p - 1, 4 * change
    x[..., ALWAYS] = 1.0
    labels = torch.full((count, length + 2), IGNORE)
    labels[:, 2:] = 30
    batch = {"inputs_embeds": x, "attention_mask": torch.ones(count, length + 2, dtype=torch.long), "labels": labels}
    return model, *([{k: v[keep] for k, v in batch.items()}] for keep in (reward, ~reward))


def ranked(made, of, probe="mlp", **options):
    model, won, lost = made
    where = sites(model, "channel", at="residual", layers=0)
    how = {"hidden": 64, "epochs": 100, "lr": 1e-2, **options}
    (scores,) = [value(Context(model, where, won, lost), of=of, probe=probe, **how)]
    (values,) = scores.values.values()
    (told,) = scores.card["auroc"].values()
    return values.argsort(descending=True).tolist(), told


def test_states_stand_from_the_prompts_end_to_the_answers():
    model, won, lost = world(0, count=8)
    where = sites(model, "channel", at="residual", layers=0)
    states, rewards, following = rollouts(Context(model, where, won, lost), ())
    (x,) = states.values()
    count = len(won[0]["labels"])
    assert x.shape == (8 * 7, 32)
    assert rewards.tolist() == [1.0] * 7 * count + [0.0] * 7 * (8 - count)
    assert following.reshape(8, 7)[:, -1].tolist() == [-1] * 8
    assert following.reshape(8, 7)[:, :-1].tolist() == [[7 * r + t + 1 for t in range(6)] for r in range(8)]
    shown = torch.cat([won[0]["inputs_embeds"], lost[0]["inputs_embeds"]])[:, 1:, UNREAD]
    torch.testing.assert_close(x[:, UNREAD].reshape(8, 7), shown)


def test_the_planted_chance_ranks_first_and_suffices_alone():
    order, told = ranked(world(0), "value")
    assert order[0] == UNREAD
    assert told["1"] >= 0.95 * told["32"]
    assert ranked(world(0), "value", probe="linear")[0][0] == UNREAD


def test_the_planted_error_tops_the_dopamine_ranking_and_not_the_other():
    made = world(0)
    assert ranked(made, "dopamine")[0][0] == SEEN
    assert ranked(made, "value", "linear")[0][0] != SEEN
    assert ranked(world(0, shuffled=True), "dopamine", "linear")[0][0] != SEEN


def test_step_ends_leave_the_states_between_out():
    made = planted(per_layer=1, decoys=0, seed=0)
    tokens = torch.tensor([[20, 21, 9, 22, 9, 23], [24, 9, 25, 26, 9, 27]])
    labels = tokens.clone()
    labels[:, :2] = IGNORE
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    where = sites(made.model, "channel", at="residual", layers=0)
    _, rewards, following = rollouts(Context(made.model, where, [batch], [batch]), (9,))
    assert following[:7].tolist() == [1, 2, 3, -1, 5, 6, -1]  # 1, 2, 4, 5 of the first row; 1, 4, 5 of the second
    assert len(rewards) == 14
    with pytest.raises(RequestError, match="one set of rollouts"):
        value(Context(made.model, where, [batch]))


def test_the_share_two_random_selections_have_in_common():
    """k of d channels drawn twice share k / (2 d - k) of their union: .0050 at k = 41, d = 4096."""
    site = {"s": Site("s", "channel", 4096)}
    one, two = (Selection.of(site, {"s": torch.arange(a, a + 41)}) for a in (0, 20))
    expected = one.overlap(two)["expected"]
    assert expected / (2 * 41 - expected) == pytest.approx(41 / (2 * 4096 - 41))
    assert pytest.approx(0.0050, abs=5e-5) == 41 / (2 * 4096 - 41)
    assert one.overlap(two)["jaccard"] == 21 / 61


def test_the_recipe_silences_the_value_channel_of_one_layer():
    model, won, lost = world(0)
    before = snapshot(model)
    changes = {"hidden": 64, "probe_epochs": 50, "probe_lr": 1e-2, "fraction": 1 / 32, "layers": (0,)}
    out = run("sparse_reward", model, {"positive": won, "negative": lost}, changes=changes)
    assert out.where.ids == {"model.layers.0/channel@residual": torch.tensor([UNREAD])}
    assert not moved(before, model)
    after = {}
    with out.graft.on(model), torch.no_grad():
        handle = model.model.layers[1].register_forward_pre_hook(lambda m, a: after.setdefault("x", a[0]))
        model(inputs_embeds=won[0]["inputs_embeds"], attention_mask=won[0]["attention_mask"])
        handle.remove()
    assert not after["x"][..., UNREAD].any()
    assert after["x"][..., SEEN].any()


GOOD, BAD = 40, 41


@effect
def test_on_three_seeds_and_against_four_controls():
    """The model answers by the value channel; controls: random, as active, without sinks, and next-token channels."""
    record = {"value": [], "dopamine": [], "shuffled": [], "share": [], "effect": [], "next_token": []}
    better = []
    for seed in range(3):
        made = world(seed)
        order, told = ranked(made, "value")
        record["value"].append(float(order[0] == UNREAD))
        record["share"].append(told["1"] / told["32"])
        record["dopamine"].append(float(ranked(made, "dopamine")[0][0] == SEEN and order[0] != SEEN))
        record["shuffled"].append(float(ranked(world(seed, shuffled=True), "dopamine")[0][0] == SEEN))
        model, won, lost = world(seed, held=True)
        with torch.no_grad():
            model.lm_head.weight[GOOD, UNREAD], model.lm_head.weight[BAD, UNREAD] = 6.0, -6.0
        asked = []
        for side, says in ((won, GOOD), (lost, BAD)):
            batch = {k: v[:32] for k, v in side[0].items()}
            labels = torch.full_like(batch["labels"], IGNORE)
            labels[:, -1] = says
            asked.append({**batch, "labels": labels})
        where = sites(model, "channel", at="residual", layers=0)
        (name,) = where
        chosen = Selection.of(where, {name: [order[0]]})
        found = ng.evidence(model, chosen, asked, limit=None, seed=seed)
        better.append(float(found.better and found.data["families"]["magnitude"]["difference"]["low"] > 0))
        record["effect"].append(found.data["effect"]["value"])
        other = following_token(model, where)
        record["next_token"].append(effect_of(model, Selection.of(where, {name: [other]}), asked))
        assert other != order[0]
        assert record["next_token"][-1] < 0.5 * effect_of(model, chosen, asked)
    note(record=json.dumps(record))
    bar("seeds in which the planted chance ranks first", record["value"], at_least=1.0)
    bar("share of the AUROC that one channel keeps", record["share"], at_least=0.95)
    bar("seeds in which the planted error tops dopamine and not value", record["dopamine"], at_least=1.0)
    bar("seeds in which it does so with the steps shuffled", record["shuffled"], at_most=0.0)
    bar("seeds in which silence is worse than random and matched channels", better, at_least=1.0)


def following_token(model, where):
    """Return the channel that tells which of two tokens is next, planted where nothing writes, found by a probe."""
    rng = generator(0, "next token")
    x = torch.randn(128, 4, 32, generator=rng)
    x[..., ALWAYS], x[:64, :, SEEN], x[64:, :, SEEN] = 1.0, 2.0, -2.0
    sides = ({"inputs_embeds": half, "attention_mask": torch.ones(64, 4, dtype=torch.long)} for half in x.split(64))
    (scores,) = probe(Context(model, where, [next(sides)], [next(sides)]), pool="mean", epochs=1000).values.values()
    return int(scores.argmax())


def effect_of(model, where, batches):
    with torch.no_grad():
        base = sum(float(model(**b).loss) for b in batches)
        with ng.intervene(model, where, "zero"):
            return sum(float(model(**b).loss) for b in batches) - base
