"""How often the verdict cries wolf: at reduced size here, at full size in `benchmarks/false_alarms.py`."""

import json
from pathlib import Path

import torch
from _tables import TASK, A, B, BigramForCausalLM, rows_graft, target, text

import neurograft as ng

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "false_alarms.json"


def null(model, size, seed):
    """Noise on four random rows, `size` times as large as what it touches."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randperm(12, generator=rng)[:4].sort().values
    base = target().clamp(min=-9)[ids]
    noise = torch.randn(base.shape, generator=rng)
    return rows_graft(model, ids.tolist(), base + size * noise * base.norm() / noise.norm())


def verdicts(size, rounds):
    model, found = BigramForCausalLM(target().clamp(min=-9)), []
    for i in range(rounds):
        keep = {"a": text(A, 24, 3 * i), "b": text(B, 24, 3 * i + 1)}
        gain = text(TASK, 24, 3 * i + 2)
        rules = {"draws": 400}
        found.append(ng.audit(model, null(model, size, i), gain=gain, keep=keep, probes="none", rules=rules, seed=i))
    return [report.verdict for report in found]


def test_null_grafts_are_rarely_judged_either_way():
    found = verdicts(0.01, 60)
    assert found.count("cannot tell") >= 57, found


def test_harm_is_seen():
    assert verdicts(2.0, 10).count("do not ship") >= 9


def test_the_measured_rate_is_within_its_target():
    found = json.loads(RESULTS.read_text())
    assert found["false_alarms"]["reached"]
    for name, row in found["changes"].items():
        assert row["of"] >= 100
        assert row["share"] >= 0.8 if name.startswith("harm") else row["share"] <= 0.05
    assert found["changes"]["empty"]["alarms"] == 0
