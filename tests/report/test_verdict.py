"""Verdict and rules, on measured numbers written by hand."""

import math

import pytest
import torch

from neurograft.audits._statistics import estimate, predicted
from neurograft.core.errors import RequestError
from neurograft.report.rules import DEFAULT, rules_of
from neurograft.report.verdict import verdict
from neurograft.report.words import MINUS, listed, number


def measure(mean, *, spread=0.01, n=40, nulls=(), rerun=0.0, unit="nats per token"):
    """A measure whose estimate has this mean and this spread between items, exactly."""
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    x = mean + spread * (x / x.std() if n > 1 else x * 0)
    change = estimate(torch.stack([x, torch.ones_like(x)], 1))
    floor = {"value": rerun, "rerun": rerun, "nulls": list(nulls), "null_mean": 0.0}
    return {"unit": unit, "change": change, "noise_floor": floor}


def judged(gain=None, rules=None, **losses):
    data = {
        "gain": None if gain is None else {"by": "likelihood", "measures": {"likelihood": gain}},
        "domains": {name: {"loss": {"measures": {"loss": m}}} for name, m in losses.items()},
    }
    return verdict(data, rules_of(rules))


GOOD = measure(0.5)


def test_the_three_verdicts():
    assert judged(GOOD, a=measure(0.0))["verdict"] == "ship"
    assert judged(GOOD, a=measure(0.05))["verdict"] == "do not ship"
    assert judged(GOOD, a=measure(0.01))["verdict"] == "cannot tell"  # straddles the tolerance
    assert judged(measure(0.001), a=measure(0.0))["verdict"] == "cannot tell"  # straddles 0
    assert judged(measure(-0.5), a=measure(0.0))["verdict"] == "do not ship"
    assert judged(GOOD)["verdict"] == "cannot tell"
    assert judged(None, a=measure(0.0))["verdict"] == "cannot tell"


def test_only_do_not_ship_has_an_exit_status():
    found = [judged(GOOD, a=measure(m))["exit_status"] for m in (0.0, 0.01, 0.05)]
    assert found == [0, 0, 3]


def test_the_limit_is_tolerance_and_noise_floor():
    nulls = [0.004, -0.004, 0.002, -0.002, 0.001, -0.001, 0.003, -0.003]
    _, spread = predicted(nulls, tail=0.05)
    test = judged(GOOD, a=measure(0.016, nulls=nulls))["domains"]["a"]["tests"]["loss"]
    assert test["limit"] == pytest.approx(0.01 + spread)
    assert test["status"] == "cannot tell"
    assert judged(GOOD, a=measure(0.016))["domains"]["a"]["status"] == "lost"  # without noise it is beyond
    two = judged(GOOD, a=measure(0.0, nulls=nulls), b=measure(0.0))["domains"]["a"]["tests"]["loss"]
    assert two["floor"] == pytest.approx(predicted(nulls, tail=0.025)[1])  # more domains, a wider floor


def test_no_floor_excuses_more_than_its_cap():
    nulls = [0.5, 1.5, 0.9, 1.1, 0.7, 1.3, 1.0, 1.0]
    found = judged(GOOD, a=measure(1.0, nulls=nulls))
    assert found["verdict"] == "do not ship"
    assert found["domains"]["a"]["tests"]["loss"]["limit"] == pytest.approx(0.03)


def test_what_all_random_changes_cost_is_no_noise():
    found = judged(GOOD, a=measure(0.05, nulls=[0.05] * 8))
    assert found["domains"]["a"]["tests"]["loss"]["excused"] == pytest.approx(0, abs=1e-12)
    assert found["verdict"] == "do not ship"


def test_a_gain_must_beat_random_changes():
    nulls = [0.1, 0.2, 0.15, 0.12, 0.18, 0.14, 0.16, 0.11]
    mean, spread = predicted(nulls, tail=0.025)
    above, below = measure(mean + spread + 0.02, nulls=nulls), measure(mean + spread - 0.02, nulls=nulls)
    assert judged(above, a=measure(0.0))["verdict"] == "ship"
    assert judged(below, a=measure(0.0))["verdict"] == "cannot tell"


def test_random_changes_that_only_harm_are_no_bar_for_a_gain():
    nulls = [-0.2, -0.6, -0.6, -0.3, -1.2, -2.2, -1.4, -0.4]
    assert sum(predicted(nulls, tail=0.025)) > 0.5
    assert judged(measure(0.25, nulls=nulls), a=measure(0.0))["verdict"] == "ship"


def test_a_small_loss_on_the_task_within_its_noise_is_no_alarm():
    nulls = [0.01, -0.01] * 4
    assert judged(measure(-0.01, spread=0.001, nulls=nulls), a=measure(0.0))["verdict"] == "cannot tell"
    assert judged(measure(-0.05, spread=0.001, nulls=nulls), a=measure(0.0))["verdict"] == "do not ship"


def test_holm_over_domains():
    edge = measure(0.0134, spread=0.01, n=40)  # p near 0.02: flagged alone, not among ten
    alone = judged(GOOD, a=edge)["domains"]["a"]
    assert 0.01 < alone["tests"]["loss"]["p"] < 0.025
    assert alone["status"] == "lost"
    clean = {f"d{i}": measure(0.0) for i in range(9)}
    many = judged(GOOD, a=edge, **clean)
    assert many["domains"]["a"]["tests"]["loss"]["p_adjusted"] == pytest.approx(10 * alone["tests"]["loss"]["p"])
    assert many["domains"]["a"]["status"] == "cannot tell"
    assert judged(GOOD, {"correction": "none"}, a=edge, **clean)["domains"]["a"]["status"] == "lost"


def test_few_items_decide_nothing():
    found = judged(GOOD, a=measure(5.0, n=7))
    assert found["verdict"] == "cannot tell"
    assert "too few items" in found["sentence"]
    assert judged(GOOD, {"min_items": 2}, a=measure(5.0, n=7))["verdict"] == "do not ship"
    assert judged(GOOD, {"min_items": 1}, a=measure(5.0, n=1))["verdict"] == "cannot tell"


def test_tolerances_by_domain_and_limits_on_other_measures():
    assert judged(GOOD, {"tolerances": {"a": 0.1}}, a=measure(0.05))["verdict"] == "ship"
    data = {
        "gain": {"by": "likelihood", "measures": {"likelihood": GOOD}},
        "domains": {"a": {"loss": {"measures": {"loss": measure(0.0)}}, "d": {"measures": {"flips": measure(0.2)}}}},
    }
    assert verdict(data, rules_of({"limits": {"flips": 0.1}}))["verdict"] == "do not ship"
    assert "moved in flips" in verdict(data, rules_of({"limits": {"flips": 0.1}}))["sentence"]
    assert verdict(data, rules_of({"limits": {"flips": 0.3}}))["verdict"] == "ship"
    with pytest.raises(RequestError, match="flips, loss"):
        verdict(data, rules_of({"limits": {"flip": 0.3}}))


def test_sentences_name_the_domain_and_the_numbers():
    found = judged(GOOD, **{"a b": measure(0.05), "c": measure(0.0)})
    assert found["sentence"].startswith("Do not ship: “a b” lost 0.05 nats per token (95 % interval 0.0")
    assert judged(GOOD, c=measure(0.0))["sentence"].startswith("Ship: the task's likelihood rose by 0.5 nats")


@pytest.mark.parametrize("rules", [{"level": 1.5}, {"nulls": 1}, {"correction": "bonferoni"}, {"limits": {"kl": "x"}}])
def test_rules_without_sense_are_refused(rules):
    with pytest.raises(RequestError, match=next(iter(rules))):
        rules_of(rules)


def test_rules_come_from_files(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("tolerance: 0.05\ntolerances: {code: 0.2}\n")
    assert rules_of(path)["tolerances"] == {"code": 0.2}
    assert rules_of({"file": str(path), "tolerance": 0.07})["tolerance"] == 0.07
    assert rules_of(None) == dict(DEFAULT)
    path.write_text("- a\n")
    with pytest.raises(RequestError, match="a list"):
        rules_of(path)
    with pytest.raises(RequestError, match="does not exist"):
        rules_of(tmp_path / "nothing.yaml")


def test_numbers_in_words():
    shown = [number(v) for v in (0.0, 0.012345, 12.345, 999.9, 123456.0, 1e-7, math.inf, None)]
    assert shown == ["0", "0.0123", "12.3", "1000", "123,456", "1e\N{MINUS SIGN}7", "∞", "\N{EN DASH}"]
    assert (listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])) == ("a", "a and b", "a, b and c")


def test_of_several_lost_domains_the_worst_is_told_first():
    found = judged(GOOD, mild=measure(0.05), worst=measure(0.9), kept=measure(0.0))
    assert found["sentence"].startswith("Do not ship: “worst” lost 0.9 ")
    assert found["reasons"][1].startswith("“mild” lost")
    capped = judged(GOOD, {"tolerances": {"worst": 0.88}}, mild=measure(0.05), worst=measure(0.9))
    assert capped["sentence"].startswith("Do not ship: “mild” lost 0.05 ")


def test_one_item_has_no_interval_and_is_told_in_english():
    one = judged(measure(0.02, n=1), a=measure(0.0, n=1))
    assert one["reasons"] == [
        "the task's likelihood changed by +0.02 nats per token (no interval), but 1 item is too few to decide",
        "too few items were given for “a”",
    ]
    assert "but 7 items are too few to decide" in judged(measure(0.02, n=7), a=measure(0.0))["sentence"]


def test_many_uncertain_domains_make_no_endless_sentence():
    two = judged(GOOD, a=measure(0.01), b=measure(0.01))["reasons"][0]
    assert two.startswith("the intervals of “a” and “b” reach beyond")
    six = judged(GOOD, **{name: measure(0.01) for name in "abcdef"})["reasons"][0]
    assert six.startswith("the intervals of “a”, “b”, “c”, “d” and 2 more reach beyond")
    assert judged(GOOD, a=measure(0.01))["reasons"][0].startswith("the interval of “a” reaches beyond")


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        ("share of items", "the task's accuracy changed by -0.125 of the items (95 % interval"),
        ("nats per token", "the task's accuracy changed by -0.125 nats per token (95 % interval"),
        ("accuracy", "the task's accuracy changed by -0.125 (95 % interval"),
    ],
)
def test_changes_are_told_in_their_unit(unit, words):
    """A share was "0 share of items", and a metric of the caller's own "-0.125 metric"."""
    gain = measure(-0.125, spread=1.0, unit=unit)
    data = {"gain": {"by": "accuracy", "measures": {"accuracy": gain}}, "domains": {}}
    assert words.replace(" -", f" {MINUS}") in " ".join(verdict(data, rules_of(None))["reasons"])
