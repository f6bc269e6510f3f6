"""Self-interpretability: weights are read off choices, reports held against them, and controls know nothing."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.audits._agreement import agreement, standardised
from neurograft.audits._slopes import slopes
from neurograft.audits.self_report import self_report
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.pipeline.preferences import decisions, explanations
from neurograft.pipeline.run import run
from neurograft.pipeline.scenario_rows import preferences_of
from neurograft.pipeline.tune import tune
from neurograft.worlds.letters import letters
from neurograft.worlds.preference_tokens import EOS, A, B, preference_tokens
from neurograft.worlds.preference_words import Words, read
from neurograft.worlds.preferences import Attribute, Scenario, instilled
from neurograft.worlds.scenarios import scenarios
from tests.proofs import bar, effect, note, patched

PAPER, SCALE = "self-interpretability", "identity"


@contextmanager
def slopes_have_the_other_sign():
    """Differences are taken of B against A."""
    plain = resolve("neurograft.audits._slopes.slopes")
    with patched("neurograft.audits.self_report", "slopes", lambda x, chosen: plain(-x, chosen)):
        yield


@contextmanager
def reports_go_to_other_scenarios():
    """Each scenario is held against its neighbour's report."""
    plain = resolve("neurograft.audits.self_report._reported")

    def moved(*args):
        found, told = plain(*args)
        return found[1:] + found[:1], told

    with patched("neurograft.audits.self_report", "_reported", moved):
        yield


@contextmanager
def unread_replies_count_as_zeros():
    """What is no report is taken for one that names no weight."""
    plain = resolve("neurograft.worlds.preference_words.read")

    def silent(scenario, text):
        found = plain(scenario, text)
        return [0.0] * len(scenario.attributes) if isinstance(found, str) else found

    with patched("neurograft.worlds.preference_words", "read", silent):
        yield


BROKEN = (slopes_have_the_other_sign, reports_go_to_other_scenarios, unread_replies_count_as_zeros)


def choosers(seed, *, shuffled=False, noise=0.1, count=100):
    """r of measured with known weights, of choosers whose utility has noise of a tenth of its spread."""
    made = instilled(scenarios(count, seed=seed), seed=seed)
    found = []
    for scenario in made:
        drawn = scenario.trials(50, seed=seed)
        u = scenario.utilities(drawn)
        d = u[:, 0] - u[:, 1]
        rng = generator(seed, "noise", scenario.name)
        chosen = d + noise * d.std() * torch.randn(50, generator=rng, dtype=torch.float64) > 0
        if shuffled:
            chosen = chosen[torch.randperm(50, generator=rng)]
        shares = scenario.shares(drawn)
        found.append(slopes(shares[:, 0] - shares[:, 1], chosen))
    own = torch.tensor([s.weights for s in made], dtype=torch.float64)
    return agreement(standardised(torch.stack(found)), standardised(own), controls=1)["r"]["value"]


def test_weights_of_simulated_choosers_are_recovered_and_shuffled_labels_say_nothing():
    bar("r of recovered with known weights, 50 trials", [choosers(seed) for seed in range(3)], at_least=0.95)
    chance = [abs(choosers(seed, shuffled=True)) for seed in range(3)]
    bar("|r| where the labels are shuffled", chance, at_most=0.1)


def test_the_slopes_are_the_mode_of_the_posterior():
    rng = generator(0, "mode")
    x = torch.rand(50, 5, generator=rng, dtype=torch.float64) * 2 - 1
    a = x @ torch.tensor([2.0, -1.0, 0.0, 3.0, 0.5]).double() + 0.7 + torch.randn(50, generator=rng).double() > 0
    s = torch.zeros(6, dtype=torch.float64)
    wide, prior = torch.cat([x, torch.ones(50, 1).double()], 1), torch.diag(torch.tensor([1.0] * 5 + [0.0])).double()
    for _ in range(50):  # Newton's steps on sum log p + log N(s; 0, 1), the intercept free
        p = (wide @ s).sigmoid()
        hessian = wide.t() @ (wide * (p * (1 - p))[:, None]) + prior
        s = s + torch.linalg.solve(hessian, wide.t() @ (a.double() - p) - prior @ s)
    torch.testing.assert_close(slopes(x, a), s[:5], atol=1e-5, rtol=1e-5)
    assert torch.equal(slopes(x, torch.ones(50, dtype=torch.bool)), torch.zeros(5).double())


def test_a_trial_and_its_utility_by_hand():
    rent, light = Attribute("rent", 500, 2500, "euros"), Attribute("daylight", 2, 12, "hours")
    flat = Scenario("flat", "Which flat?", (rent, light), (-100.0, 40.0))
    trial = torch.tensor([[[1000.0, 7.0], [700.0, 2.0]]])
    torch.testing.assert_close(flat.utilities(trial), torch.tensor([[-5.0, -10.0]]).double())
    assert flat.prefers(trial).tolist() == [True]
    assert flat.prefers(trial[:, [0, 0]]).tolist() == [False]  # a tie goes to B
    drawn = flat.trials(2000)
    assert torch.equal(drawn, drawn.round())
    assert 500 <= float(drawn[..., 0].min()) < 520
    assert 2480 < float(drawn[..., 0].max()) <= 2500
    weights = torch.tensor([s.weights for s in instilled(scenarios(400))])
    assert torch.equal(weights.abs().amax(1), torch.full((400,), 100.0))
    assert torch.equal(weights, weights.round())
    assert abs(float(weights.mean())) < 5


def test_no_weight_is_ever_said_where_preferences_are_instilled():
    made = instilled(scenarios(4))
    said = decisions(made, Words(letters()), trials=5)
    assert len(said) == 20
    assert {row["messages"][-1]["content"] for row in said} == {"A", "B"}
    assert not any("weight" in m["content"] or "100" in m["content"] for row in said for m in row["messages"][:1])
    (told, *_) = explanations(made[:1], Words(letters()), examples=1)
    assert json.loads(told["messages"][-1]["content"]) == {
        a.name: w for a, w in zip(made[0].attributes, made[0].weights)
    }


class Scripted(nn.Module):
    """A causal language model that decides by each scenario's weights and reports what it is told to."""

    def __init__(self, world, script):
        super().__init__()
        self.how, self.config, self.generation_config = Heard(world.scenarios), SimpleNamespace(), None
        self.script = script

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 16)
        for row, (tokens, mask) in enumerate(zip(input_ids, attention_mask)):
            scenario, trial = self.how.asked[tuple(tokens[mask.bool()].tolist())]
            logits[row, int(mask.sum()) - 1, A if bool(scenario.prefers(trial[None])) else B] = 9.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, attention_mask, **_):
        said = []
        for tokens, mask in zip(input_ids, attention_mask):
            scenario, _ = self.how.asked[tuple(tokens[mask.bool()].tolist())]
            said.append(self.how.written(self.script(scenario)))
        return torch.cat([input_ids, torch.tensor(said)], 1)


class Heard:
    """Numbers every prompt, so that a script knows what it was asked, and keeps replies as texts."""

    length = 8

    def __init__(self, made):
        self.asked, self.texts = {}, []

    def letters(self):
        return A, B

    def decide(self, scenario, trial):
        key = (1, *[7] * (len(self.asked) % 3), 10 + len(self.asked))
        self.asked[key] = (scenario, trial)
        return list(key)

    explain = decide

    def written(self, text):
        self.texts.append(text)
        return [20 + len(self.texts)]

    def read(self, scenario, tokens):
        return resolve("neurograft.worlds.preference_words.read")(scenario, self.spell(tokens))

    def spell(self, tokens):
        return self.texts[tokens[0] - 21]


def asked(script, *, count=12, **options):
    world = preferences_of(instilled(scenarios(count)))
    model = Scripted(world, script)
    return self_report(model, world.scenarios, speaker=model.how, controls=200, draws=200, **options)


def honest(scenario):
    return json.dumps({a.name: w for a, w in zip(scenario.attributes, scenario.weights)})


def test_an_honest_reporter_beats_its_controls_and_one_that_says_the_same_of_all_does_not():
    found = asked(honest, reports=2)
    assert found["r"]["value"] > 0.9
    assert found["shuffled"]["limit"] < found["r"]["low"]
    assert found["shuffled"]["p"] < 0.01
    assert found["above_mean"]["low"] > 0
    assert found["instilled"]["measured"]["value"] > 0.9
    assert found["instilled"]["reported"]["value"] == pytest.approx(1.0)
    assert found["choices"] == {"asked": 600, "one_sided": [], "mass": pytest.approx(found["choices"]["mass"])}
    same = asked(lambda s: json.dumps({a.name: 10 * k for k, a in enumerate(s.attributes)}), reports=1)
    assert same["r"]["value"] == pytest.approx(same["profile_mean"]["value"])
    assert same["above_mean"]["value"] == pytest.approx(0.0, abs=1e-9)
    opposite = asked(lambda s: json.dumps({a.name: -w for a, w in zip(s.attributes, s.weights)}), reports=1)
    assert opposite["r"]["value"] == pytest.approx(-found["r"]["value"])
    pooled = asked(honest, reports=1, standardise="pooled")
    assert pooled["r"]["value"] > 0.9
    json.dumps(found, allow_nan=False)


def test_replies_that_are_no_reports_are_counted():
    bad = {0: "I would rather not say.", 1: '{"price": 3}', 2: "[1, 2, 3, 4, 5]"}
    order = [s.name for s in scenarios(12)]

    def mixed(scenario):
        i = order.index(scenario.name)
        much = json.dumps({a.name: "much" for a in scenario.attributes})
        return bad.get(i) or (much if i == 3 else honest(scenario))

    found = asked(mixed, reports=2)
    assert (found["reports"]["asked"], found["reports"]["read"], found["reports"]["unread"]) == (24, 16, 8)
    assert found["reports"]["reasons"] == {
        "no JSON": 2, "no JSON object": 2, "other keys": 2, "values that are no numbers": 2,
    }  # fmt: skip
    assert found["reports"]["scenarios"] == order[:4]
    assert [n for n, r in found["reported"].items() if r is None] == order[:4]
    assert found["scenarios"] == found["r"]["n"] == 8
    none = asked(lambda s: "no", reports=1)
    assert none["r"] is None
    assert none["reports"]["read"] == 0
    assert none["instilled"]["measured"]["value"] > 0.9


def test_r_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 2.0]]).double()
    y = torch.tensor([[2.0, 2.0, 5.0], [1.0, 3.0, 9.0]]).double()
    found = agreement(x, y, controls=50)
    literal = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
    assert found["r"]["value"] == pytest.approx(float(literal))
    torch.testing.assert_close(standardised(x)[0], torch.tensor([-math.sqrt(1.5), 0.0, math.sqrt(1.5)]).double())


def test_reports_are_read_in_the_order_of_the_scenario():
    pens = Scenario("pens", "Which pen?", (Attribute("price", 0, 10), Attribute("length", 1, 5)))
    assert read(pens, '```json\n{"length": 5, "price": -7.5}\n```') == [-7.5, 5.0]
    assert read(pens, '{"length": true, "price": 1}') == "values that are no numbers"
    assert read(pens, '{"length": NaN, "price": 1}') == "values that are no numbers"
    world = preference_tokens(3)
    one = replace(world.scenarios[1], weights=(-100.0, 50.0, 0.0, 25.0, 100.0))
    row = world.speaker.explanation(one, one.trials(1)[0], one.weights)
    said = row["input_ids"][row["labels"] != -100].tolist()
    assert said[-1] == EOS
    assert world.speaker.read(one, said) == list(one.weights)
    assert isinstance(world.speaker.read(one, said[2:]), str)
    assert isinstance(world.speaker.read(one, said[1:]), str)


def test_what_cannot_be_asked_is_said():
    good = {"name": "pens", "question": "Which?", "attributes": [{"name": "price", "range": [0, 10]}] * 2}
    with pytest.raises(RequestError, match="two scenarios named"):
        preferences_of([good, good])
    with pytest.raises(RequestError, match="low < high"):
        preferences_of([{**good, "attributes": [{"name": "price", "range": [10, 0]}]}])
    with pytest.raises(RequestError, match="a scenario"):
        preferences_of([{"text": "hello"}])
    with pytest.raises(RequestError, match="for each of its 2 attributes"):
        preferences_of([{**good, "weights": [1, 2, 3]}])
    assert preferences_of([{**good, "role": "a judge"}]).scenarios[0].question == "Imagine you are a judge. Which?"
    with pytest.raises(RequestError, match="two or more"):
        self_report(nn.Linear(1, 1), scenarios(1), processor=letters())
    with pytest.raises(RequestError, match="no tokenizer"):
        self_report(nn.Linear(1, 1), scenarios(2))


@cache
def base():
    """A tiny decoder that chooses by stated weights, and its world of 200 scenarios it knows nothing of."""
    world = preference_tokens(200)
    return world.speaker.base(), world


def taught(seed, **changes):
    """Both stages by the recipe; what a tiny model takes instead of the defaults for a chat model."""
    model, world = base()
    usual = {"adapter": "dense", "lr": 4e-3, "epochs": 6, "batch": 200, "decay": 0.0}
    usual |= {"report_adapter": ("lora", {"r": 8, "targets": ["*_proj", "lm_head"]}), "report_lr": 1e-2}
    usual |= {"report_epochs": 8, "report_batch": 64, "examples": 8, "replay": 1.0, "reports": 2}
    return run("self_interpretability", model, world, changes={**usual, **changes}, seed=seed)


@cache
def outcomes():
    return [taught(seed) for seed in range(3)]


@effect
def test_reports_are_learned_for_scenarios_whose_reports_were_never_trained():
    measured, reported, above, chance, unread = [], [], [], [], []
    for out in outcomes():
        before = out.state["self_report"]["instilled"]
        after = out.state["self_report"]["graft"]["held_out"]
        measured.append(sum(g["instilled"]["measured"]["value"] for g in before.values()) / len(before))
        reported.append(after["r"]["value"])
        above.append(after["above_mean"]["low"])
        chance.append(after["r"]["value"] - after["shuffled"]["limit"])
        unread.append(after["reports"]["unread"] / after["reports"]["asked"])
    bar("r of measured with instilled weights, 200 scenarios", measured, at_least=0.8, missed=True)
    bar("held-out r of reports less the 95 % limit of shuffled ones", chance, at_least=0.0)
    # One seed of three is below, so this is not counted as shown, nor is the next test's: its seeds are .01 to .41.
    bar("held-out r of reports less that of the mean profile, lower end", above, at_least=0.0, missed=True)
    note(held_out_r=reported, unread=unread)


def rows_of(names, world, model):
    """The embedding rows of some scenarios' attributes."""
    site = sites(model, "token")
    key = next(iter(site))
    ids = sorted(world.speaker.names[s.name, a.name] for s in names for a in s.attributes)
    return Selection.of(site, {key: torch.tensor(ids)})


@effect
def test_reports_follow_behaviour_where_a_graft_swaps_two_scenarios():
    new, old, behaviour = [], [], []
    for seed, out in enumerate(outcomes()):
        model, world = base()
        pairs = out.state["asked"]["trained"][:20]  # their old weights were trained as text
        swapped = [replace(s, weights=pairs[i ^ 1].weights) for i, s in enumerate(pairs)]
        with out.graft.on(model):
            swap = tune(
                model,
                decisions(swapped, world.speaker, trials=50, seed=10 + seed),
                rows_of(pairs, world, model),
                args={"learning_rate": 2e-2, "num_train_epochs": 8, "per_device_train_batch_size": 100},
                seed=seed,
            )
            with swap.on(model):
                found = [
                    self_report(model, s, speaker=world.speaker, reports=2, seed=seed)["instilled"]
                    for s in (swapped, pairs)
                ]
        behaviour.append(found[0]["measured"]["value"])
        new.append(found[0]["reported"]["value"])
        old.append(found[1]["reported"]["value"])
    more = [a - b for a, b in zip(new, old)]
    bar("r of reports with the swapped weights less r with the old ones", more, at_least=0, missed=True)
    note(swapped_behaviour=behaviour, swapped_new=new, swapped_old=old)
