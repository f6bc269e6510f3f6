"""Laws of the proofs: every one is well formed, and fails when its mechanism is spoilt."""

import inspect
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from tests.proofs import __main__ as runner
from tests.proofs import bar, note
from tests.proofs._run import SCALES, Proof, find, noticed, traced

from neurograft.pipeline import _proofs
from neurograft.pipeline.papers import known, papers
from neurograft.pipeline.recipe import recipes

# Sabotages of one proof share its worlds, which are built once in a process.
CASES = [
    pytest.param(proof, name, id=f"{proof.name}-{name}", marks=pytest.mark.xdist_group(proof.name))
    for proof in find()
    for name in proof.broken
]


@pytest.mark.parametrize("proof", find(), ids=lambda p: p.name)
def test_a_proof_is_well_formed(proof):
    assert proof.slug == proof.module.PAPER
    assert proof.slug in known()
    assert proof.name in recipes()
    assert proof.module.SCALE in SCALES
    assert 1 <= len(proof.broken) <= 3
    assert all(s.__doc__ for s in proof.broken.values()), "a sabotage says what it spoils"
    tests = proof.tests(effects=True)
    assert tests
    assert not any(inspect.signature(t).parameters for t in tests)


@pytest.mark.parametrize(("proof", "name"), CASES)
def test_a_proof_fails_when_its_mechanism_is_spoilt(proof, name):
    before = _proofs.read().get(proof.slug, {}).get("broken", {}).get(name)
    assert noticed(proof, proof.broken[name], first=before), f"{proof.slug} passes although {name}"


def test_every_recipe_of_a_paper_has_a_proof():
    slugs = {proof.slug for proof in find()}
    assert {r["slug"] for r in papers() if r["recipe"]} <= slugs


def test_all_papers_are_known():
    rows = papers()
    assert len(rows) == len({r["slug"] for r in rows}) == 119
    assert all(
        set(r) == {*["slug", "title", "arxiv", "room", "recipe", "working", "proof", "scale", "departs"]} for r in rows
    )


def test_the_trace_sees_what_is_called_and_only_that():
    with traced() as files:
        known()
        _proofs.file_digest(_proofs.PACKAGE / "none")
    assert "pipeline/_proofs.py" in files
    assert "pipeline/attach.py" not in files


def proof_of(test, *broken):
    """A proof that is no file, for the runner."""
    made = Proof("dft")
    made.__dict__["module"] = SimpleNamespace(test_it=test, SCALE="identity", BROKEN=broken)
    return made


@contextmanager
def harmless():
    """Spoils nothing."""
    yield


@contextmanager
def crashing():
    """Breaks the test's own footing, which shows nothing."""
    raise TypeError("crash")
    yield


def test_the_runner_sees_failures_and_sabotages_that_pass():
    def passes():
        note(answer=42.0)

    def fails():
        raise AssertionError("no")

    good, _ = runner.record(proof_of(passes))
    assert (good["passed"], good["broken"], good["numbers"]) == (True, {}, {"answer": 42.0})
    assert _proofs.standing(good) == "toothless"
    blunt, text = runner.record(proof_of(passes, harmless))
    assert _proofs.standing(blunt) == "toothless"
    assert "not noticed" in text
    crashed, text = runner.record(proof_of(passes, crashing))
    assert _proofs.standing(crashed) == "toothless"
    assert "crashed" in text
    bad, text = runner.record(proof_of(fails, harmless))
    assert _proofs.standing(bad) == "failing"
    assert "AssertionError" in text


def test_a_bar_that_is_missed_is_declared_and_lowers_the_scale():
    def undeclared():
        bar("kept", [0.9, 0.6], at_least=0.9)

    def declared():
        bar("kept", [0.9, 0.6], at_least=0.9, missed=True)

    assert not runner.record(proof_of(undeclared, harmless))[0]["passed"]
    record, _ = runner.record(proof_of(declared, harmless))
    assert record["passed"]
    assert record["bars"] == {"kept": {"asked": "≥ 0.9", "reached": [0.9, 0.6], "met": False}}
    grand = proof_of(declared, harmless)
    grand.module.SCALE = "tiny"
    record, text = runner.record(grand)
    assert not record["passed"]
    assert "kept" in text


def test_a_record_goes_stale_with_any_file_it_ran_through(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(_proofs, "PACKAGE", tmp_path)
    record = {"passed": True, "broken": {"b": "test"}, "files": _proofs.digests(["a.py"]), "tests": {}}
    assert _proofs.standing(record) == "passing"
    (tmp_path / "a.py").write_text("x = 2\n")
    assert _proofs.standing(record) == "stale"
    assert _proofs.standing({**record, "broken": {"b": False}}) == "toothless"
    assert _proofs.standing({**record, "broken": {}}) == "toothless"
    assert _proofs.standing({**record, "passed": False}) == "failing"
    assert _proofs.standing(None) == "none"


def test_changed_proofs_come_first_then_the_stalest(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(_proofs, "PACKAGE", tmp_path)
    good = {"passed": True, "broken": {"b": "t"}, "files": _proofs.digests(["a.py"]), "tests": {}}
    records = {
        "old": {**good, "date": "2026-01-01"},
        "new": {**good, "date": "2026-02-01"},
        "off": {**good, "files": {"a.py": "other"}, "date": "2026-03-01"},
    }
    order = [p.slug for p in runner.order([Proof(n) for n in ("new", "old", "off", "never")], records)]
    assert order == ["never", "off", "old", "new"]


def test_papers_reads_every_file_once_however_many_proofs_ran_through_it(monkeypatch):
    read = []
    plain = _proofs.file_digest
    monkeypatch.setattr(_proofs, "file_digest", lambda path: read.append(path) or plain(path))
    papers()
    assert read
    assert len(read) == len(set(read))
