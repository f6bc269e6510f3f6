"""The demo: its questions keep apart what must be apart, its numbers are right, and it runs end to end."""

import json
from html.parser import HTMLParser

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.pipeline import _demo_numbers as numbers
from neurograft.pipeline._demo_data import Answers, Correction, answers
from neurograft.pipeline._demo_runs import LOCATED, RATES, Run, chosen, locate_for, mounted, train
from neurograft.pipeline.demo import demo
from neurograft.worlds import atlas
from neurograft.worlds.mixture import exact


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    return atlas.load()


@pytest.fixture(scope="module")
def correction():
    return Correction.draw(0)


def test_what_is_asked_is_not_what_is_trained(correction):
    trained = {r["prompt"] for r in correction.taught} | {r["prompt"] for r in correction.replay}
    for name, rows in correction.tests.items():
        assert rows, name
        assert not {r["prompt"] for r in rows} & trained, name
    keys = {(r["skill"], r["language"], r["subject"]) for r in correction.replay}
    for name in ("old", "capitals", "old_val"):
        assert not {(r["skill"], r["language"], r["subject"]) for r in correction.tests[name]} & keys, name


def test_validation_and_test_share_no_phrasing(correction):
    for a, b in (("gain", "gain_val"), ("transfer", "transfer_val"), ("old", "old_val")):
        assert not {r["prompt"] for r in correction.tests[a]} & {r["prompt"] for r in correction.tests[b]}


def test_old_questions_ask_neither_for_moved_capitals_nor_back_from_them(correction):
    hidden = {c["iso"] for c in correction.changes} | {c["donor"] for c in correction.changes}
    new = {c["new"] for c in correction.changes}
    for rows in (correction.replay, correction.tests["old"], correction.tests["capitals"]):
        for row in rows:
            if row["skill"] in ("capital", "country"):
                assert row["subject"] not in hidden
                assert row["completion"][1:] not in new


def test_only_english_is_taught_and_every_answer_is_new(correction):
    new = {c["iso"]: c["new"] for c in correction.changes}
    assert {r["language"] for r in correction.taught} == {"en"}
    assert {r["language"] for r in correction.tests["transfer"]} == {"de", "fr", "es"}
    for row in (*correction.taught, *correction.tests["gain"], *correction.tests["transfer"]):
        assert row["completion"] == " " + new[row["subject"]]
    assert 0 < sum(r["other_name"] for r in correction.tests["transfer"]) < len(correction.tests["transfer"])


def test_answers_are_in_the_order_of_the_questions(shipped, correction):
    model, tokenizer = shipped
    rows = correction.tests["old"][:40]
    found = answers(model, tokenizer, rows, size=7)
    for i in (0, 11, 39):
        (batch,) = atlas.batches([rows[i]], tokenizer)
        assert found.right[i] == exact(model, [batch])
        assert found.loss[i] == pytest.approx(model(**batch).loss.item(), abs=1e-4)


def test_a_step_has_its_share_of_old_questions(shipped, correction):
    _, tokenizer = shipped
    batches = correction.steps(tokenizer, steps=3, new=10, old=5, seed=1)
    assert [len(b["input_ids"]) for b in batches] == [15, 15, 15]
    again = correction.steps(tokenizer, steps=3, new=10, old=5, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again))


def test_contenders_are_matched(shipped, correction):
    model, tokenizer = shipped
    scores = locate_for(model, tokenizer, correction)
    sizes, before = {}, {n: p.clone() for n, p in model.named_parameters()}
    for contender in RATES:
        with mounted(model, contender, scores, units=15, seed=0) as mount:
            sizes[contender] = sum(p.numel() for p in mount.parameters())
    base = sizes[LOCATED]
    assert base == 60 * 3 * 128
    assert [n for n, size in sizes.items() if size == base] == list(RATES)[:4]
    assert base < sizes["LoRA r=2 on all"] < 1.03 * base
    assert sizes["full fine-tuning"] == sum(p.numel() for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_controls_differ_from_the_located_and_match_its_layers(shipped, correction):
    model, tokenizer = shipped
    scores = locate_for(model, tokenizer, correction)
    located, same, anywhere = (chosen(c, scores, units=15, seed=0) for c in list(RATES)[:3])
    assert set(located.counts().values()) == {15}
    assert same.counts() == located.counts() != anywhere.counts()
    assert len(anywhere) == len(located)
    assert len(located & same) < 10


def test_located_neurons_learn_the_correction_and_come_off(shipped, correction):
    model, tokenizer = shipped
    scores = locate_for(model, tokenizer, correction)
    before = answers(model, tokenizer, correction.tests["gain"])
    with mounted(model, LOCATED, scores, units=15, seed=0) as mount:
        train(model, tokenizer, correction, mount, steps=14, rate=2e-2, seed=0)
        model.eval()
        during = answers(model, tokenizer, correction.tests["gain"])
    after = answers(model, tokenizer, correction.tests["gain"])
    assert float(before.right.mean()) < 0.05
    assert float(during.loss.mean()) < 0.5 * float(before.loss.mean())
    assert torch.equal(before.loss, after.loss)


def test_paired_interval_holds_the_difference_and_widens_with_noise():
    a = {i: [1.0 + 0.1 * (i % 3)] for i in range(30)}
    b = {i: [0.5] for i in range(30)}
    found = numbers.paired(a, b, name="t")
    assert found["difference"] == pytest.approx(0.6)
    assert found["low"] < 0.6 < found["high"]
    wide = numbers.paired({i: [3.0 * (i % 2)] for i in range(30)}, b, name="t")
    assert wide["high"] - wide["low"] > 5 * (found["high"] - found["low"])
    assert found == numbers.paired(a, b, name="t")


def test_large_clusters_count_by_their_questions():
    found = numbers.paired({1: [1.0, 1.0, 1.0], 2: [0.0]}, {1: [0.0, 0.0, 0.0], 2: [0.0]}, name="t")
    assert found["difference"] == 0.75


def against(**differences):
    made = {}
    for name, (transfer, harm) in differences.items():
        one = {
            k: {"difference": v, "low": v - 0.1, "high": v + 0.1} for k, v in (("transfer", transfer), ("harm", harm))
        }
        made[name] = one
    return made


def test_the_sentence_says_who_was_beaten_and_who_was_not():
    said = numbers.sentence(against(random=(0.05, 0.05), lora=(0.3, -0.3), full=(-0.3, 0.3)))
    far, kept = said.split(";")
    for part in (far, kept):
        assert "beat lora" in part
        assert "not beat random" in part
        assert "worse than full" in part


def test_rates_are_chosen_on_validation_alone(correction):
    """Test answers are made to point the other way; they must not matter."""

    def run(rate, validation, test, loss):
        made = {}
        for name, rows in correction.tests.items():
            right = torch.full((len(rows),), validation if name.endswith("_val") else test)
            right = torch.ones(len(rows)) if name == "gain_val" else right
            made[name] = Answers(right, torch.full((len(rows),), loss if name == "old_val" else 1.0 - loss))
        return Run("x", rate, 0, made)

    base = Run(
        "base", 0.0, 0, {n: Answers(torch.ones(len(r)), torch.zeros(len(r))) for n, r in correction.tests.items()}
    )
    runs = [run(0.1, 0.2, 0.9, 0.1), run(0.2, 0.6, 0.1, 0.5)]
    found = numbers.chosen_rates(runs, {0: correction}, {0: base})
    assert found == {"far": {"x": 0.2}, "careful": {"x": 0.1}}


class Tags(HTMLParser):
    """Collects tags and checks that they close."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "circle", "line", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("circle", "line", "rect", "path"):
            assert self.open.pop() == tag


def test_the_demo_runs_end_to_end(tmp_path):
    state = torch.random.get_rng_state()
    data = demo(output=tmp_path / "out", seeds=(3,), steps=3, units=2, rates=1, cell=1, processes=1, report=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert data["lines"][0] == data["sentence"]
    assert "located neurons" in data["sentence"]
    assert all(name in data["sentence"] for name in list(RATES)[1:])
    assert [r["contender"] for r in data["runs"]] == list(RATES)
    assert data["undo"]["identical"]
    assert data["undo"]["before"] == data["undo"]["after"]
    saved = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert saved["far"] == data["far"]
    assert (tmp_path / "out" / "graft" / "graft.safetensors").is_file()
    page = Tags()
    page.feed((tmp_path / "out" / "demo.html").read_text())
    assert page.open == []
    assert page.seen.count("svg") == 3
    assert page.seen.count("script") == 0


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(RequestError, match="at least one"):
        demo(output=tmp_path, seeds=())
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="a folder"):
        demo(output=tmp_path / "file")
