"""Changes of a recipe's steps: which step, which argument, and what stays."""

import pytest

import neurograft as ng
from neurograft.pipeline.changed import changed
from neurograft.pipeline.few_shot import few_shot
from neurograft.pipeline.recipe import VERBS, Recipe
from neurograft.worlds.pico import pico, pico_batch


def steps(recipe, changes, do):
    return [s for s in changed(recipe, changes).steps if s["do"].endswith(do)]


def test_every_step_of_a_verb_keeps_its_own_other_arguments():
    """The fine-tune and the learning of the mask have rates that lie ten orders of magnitude apart."""
    made = steps("skill_grafting", {"tune.args.max_steps": 3}, "tune")
    assert [s["args"]["learning_rate"] for s in made] == [5e-3, 1e7]
    assert [s["args"]["max_steps"] for s in made] == [3, 3]
    assert [s["optimizer"] for s in made] == ["SGD", "SGD"]


def test_functions_are_steps_by_their_last_name_too():
    for name in ("few_shot", "neurograft.pipeline.few_shot"):
        (made,) = steps("tarot", {f"{name}.between": " "}, "few_shot")
        assert (made["between"], made["size"]) == (" ", 20)
    (made,) = steps("sdr_dendrites", {"recognised.of": "bits"}, "recognised")
    assert made["of"] == "bits"
    (made,) = steps("self_interpretability", {"self_reported.bootstrap": 10}, "self_reported")
    assert made["bootstrap"] == 10


def test_a_change_reaches_into_a_choice():
    (made,) = steps("nmke", {"edit.by.eos": True}, "edit")
    assert made["by"][0] == "nmke"
    assert (made["by"][1]["eos"], made["by"][1]["mask"]) == (True, "post")
    (made,) = steps("milan", {"intervene.ship": "weights"}, "intervene")
    assert made["ship"] == "weights"


BAD = {
    "select.fraction": ("dft", "the step 'select'.*one of tune"),
    "tune.lr": ("dft", "the argument 'lr' of tune"),
    "few_shot.shot": ("tarot", "'shot' of few_shot.*did you mean 'shots'"),
    "edit.batch.size": ("nmke", "within 100.*give edit.batch as a whole"),
    "fewshot.shots": ("tarot", "locate, select, few_shot, edit"),
}


@pytest.mark.parametrize("key", BAD)
def test_changes_that_land_on_nothing_are_named(key):
    recipe, words = BAD[key]
    with pytest.raises(ng.RequestError, match=words):
        changed(recipe, {key: 1})


def test_a_recipe_of_a_verb_that_run_does_not_carry_out_is_refused_when_it_is_made():
    """`merge` was taken, and `plan` then said that everything trains."""
    with pytest.raises(ng.RequestError, match="the step 'merge'"):
        Recipe("two", ({"do": "merge"},))
    for verb in VERBS:
        Recipe("one", ({"do": verb},))


@pytest.mark.parametrize(("name", "option"), [("milan", "ship"), ("sct", "place"), ("cones", "layers")])
def test_words_that_only_a_recipe_reads_are_refused_before_anything_runs(name, option):
    with pytest.raises(ng.RequestError, match="nonsense"):
        ng.recipe(name, **{option: "nonsense"})


def test_few_shot_takes_no_more_rows_than_it_is_told_to_ready_ones_too():
    rows = [{"input_ids": [5, 6, i], "labels": [-100, -100, i]} for i in range(30)]
    state = {"data": rows, "common": {"seed": 0}}
    assert len(few_shot(state, shots=[0], size=7)["shown"]) == 7
    net = pico("llama")
    batches = [pico_batch(net, batch=4, seed=i) for i in range(3)]
    shown = few_shot({**state, "data": batches}, shots=[0], size=6)["shown"]
    assert [len(b["input_ids"]) for b in shown] == [len(b["labels"]) for b in shown] == [4, 2]
