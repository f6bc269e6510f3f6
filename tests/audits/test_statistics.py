"""Intervals, tails and corrections against closed forms, paper and scipy."""

import math

import pytest
import scipy.stats
import torch

from neurograft.audits._statistics import (
    PROBABILITIES,
    estimate,
    expanded,
    holm,
    p_above,
    predicted,
    resampled,
    t_cdf,
    t_quantile,
)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 30, 101, 999, 1000, 1001, 5000])
def test_students_t_equals_scipy(df):
    for t in (-9.0, -2.3, -0.4, 0.0, 0.7, 1.96, 12.0):
        assert t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), abs=1e-7)
    for p in (0.0005, 0.025, 0.3, 0.5, 0.95, 0.9995):
        assert t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-4, abs=1e-9)


def table(values):
    x = torch.as_tensor(values, dtype=torch.float64)
    return torch.stack([x, torch.ones_like(x)], 1)


@pytest.mark.parametrize("n", [8, 40, 400])
def test_the_interval_of_a_mean_is_students(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = estimate(table(x), draws=6000)
    half = scipy.stats.t.ppf(0.975, n - 1) * float(x.std()) / math.sqrt(n)
    assert found["value"] == pytest.approx(float(x.mean()))
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.08)
    plain = math.sqrt((n - 1) / n) * 1.96 * float(x.std()) / math.sqrt(n)
    assert n > 100 or abs(found["high"] - found["low"] - 2 * half) < abs(found["high"] - found["low"] - 2 * plain)


def test_it_holds_the_truth_as_often_as_it_says():
    rng, hits, rounds, n = torch.Generator().manual_seed(0), 0, 300, 10
    for i in range(rounds):
        found = estimate(table(torch.randn(n, generator=rng, dtype=torch.float64) + 1), draws=500, seed=i)
        hits += found["low"] <= 1 <= found["high"]
    assert 0.92 <= hits / rounds <= 0.98


def test_tokens_weigh_alike_whatever_their_item():
    columns = torch.tensor([[10.0, 1.0], [0.0, 9.0]], dtype=torch.float64)
    assert estimate(columns)["value"] == 1.0


def test_p_values_agree_with_intervals():
    x = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimate(table(x), level=0.95)
    assert p_above(found, found["low"]) == pytest.approx(0.025, abs=0.004)
    assert p_above(found, found["high"]) == pytest.approx(0.975, abs=0.004)
    assert p_above(found, found["low"] - 9) < 1e-3 < 0.999 < p_above(found, found["high"] + 9)


def test_one_item_has_no_interval():
    found = estimate(table([3.0]))
    assert (found["value"], found["low"], found["high"]) == (3.0, None, None)
    assert p_above(found, 0.0) == 1.0


def test_equal_items_have_a_point_for_an_interval():
    found = estimate(table([0.0] * 5))
    assert found["low"] == found["high"] == 0.0
    assert p_above(found, 0.0) > 0.9


def test_holm_by_hand():
    # sorted: .01 * 4, .02 * 3, then max(.06, .03 * 2), max(.06, .5)
    assert holm({"a": 0.03, "b": 0.01, "c": 0.5, "d": 0.02}) == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06}
    )
    assert holm({}) == {}
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_prediction_limit_by_hand():
    mean, above = predicted([1.0, 2.0, 3.0], tail=0.05)
    assert mean == 2.0
    assert above == pytest.approx(2.919986 * 1.0 * math.sqrt(4 / 3), rel=1e-5)
    assert predicted([5.0], tail=0.05) == (5.0, 0.0)


def test_draws_are_named_by_seed_and_name_and_leave_the_global_generator_alone():
    before, x = torch.get_rng_state(), table([1.0, 2.0, 4.0])
    one = resampled(x, lambda s: s[:, 0], draws=50, seed=1, name="a")
    assert torch.equal(one, resampled(x, lambda s: s[:, 0], draws=50, seed=1, name="a"))
    assert not torch.equal(one, resampled(x, lambda s: s[:, 0], draws=50, seed=1, name="b"))
    assert torch.equal(before, torch.get_rng_state())


def test_the_grid_is_symmetric():
    assert [round(1 - p, 9) for p in reversed(PROBABILITIES)] == [round(p, 9) for p in PROBABILITIES]
    assert expanded(0.025, 10**6) == pytest.approx(0.025, abs=1e-5)
    assert expanded(0.025, 5) < 0.01
