"""A recipe file is data: what it names is neurograft's own, unless whoever runs it trusts more."""

import json
import sys

import pytest
from tests._command import command

import neurograft as ng
from neurograft.core.choose import ROOMS, asked, choose, methods
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.core.trust import trusting
from neurograft.pipeline.recipe import Recipe, recipe, recipes
from neurograft.worlds.pico import pico, pico_batch

SPY = """
from neurograft.core.context import Phase
from neurograft.locators.magnitude import magnitude
from neurograft.pipeline.recipe import Recipe
open({mark!r}, "w").close()  # whoever imports it leaves a trace
def step(state, **options): return {{"seen": options}}
def locator(context): return magnitude(context)
def loss(step, **options): return step.outputs.loss
def schedule(step, names): return Phase()
def listed(state): return [1]
def made(**options): return Recipe("made", ({{"do": "locate", "by": "magnitude"}},))
"""


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """A package that leaves a mark as soon as it is imported; the fixture's value is the mark."""
    mark = tmp_path / "mark"
    (tmp_path / "stranger.py").write_text(SPY.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("stranger", None)


def written(folder, text):
    (folder / "r.yaml").write_text(json.dumps(text))
    return folder / "r.yaml"


LOCATE, SELECT = {"do": "locate", "by": "magnitude"}, {"do": "select", "count": 2}
TUNE = {"do": "tune", "args": {"max_steps": 1}}
RESELECT = {"locate": {"by": "stranger.locator"}, "select": {"count": 2}}
EVERY = ["every", {"steps": 1}]
AUDIT = {"do": "audit", "keep": {"a": "$data"}}
FILES = {
    "a step": {"steps": [{"do": "stranger.step"}]},
    "a change of a step": {"steps": [{"do": "stranger.step"}], "changes": {"stranger.step.x": 1}},
    "a recipe": {"recipe": "stranger.made"},
    "a locator": {"steps": [{**LOCATE, "by": "stranger.locator"}]},
    "a locator as a change": {"steps": [LOCATE], "changes": {"locate.by": "stranger.locator"}},
    "a locator with options": {"steps": [{**LOCATE, "by": ["stranger.locator", {}]}]},
    "a locator on a card": {"steps": [{**LOCATE, "by": {"path": "stranger.locator"}}]},
    "a locator in a locator": {"steps": [{**LOCATE, "by": ["within", {"by": "stranger.locator"}]}]},
    "a selector": {"steps": [LOCATE, {"do": "select", "by": "stranger.locator"}]},
    "an objective": {"steps": [{**TUNE, "objective": "stranger.loss"}]},
    "an adapter": {"steps": [{**TUNE, "adapter": "stranger.loss"}]},
    "an anchor": {"steps": [{**TUNE, "anchor": "stranger.loss"}]},
    "an optimizer": {"steps": [{**TUNE, "optimizer": "stranger.loss"}]},
    "a schedule": {"steps": [{**TUNE, "schedule": "stranger.schedule"}]},
    "a new selection": {"steps": [LOCATE, SELECT, {**TUNE, "schedule": EVERY, "reselect": RESELECT}]},
    "an edit": {"steps": [{"do": "edit", "by": "stranger.loss"}]},
    "a metric": {"steps": [LOCATE, SELECT, TUNE, {**AUDIT, "metrics": "stranger.loss"}]},
    "a probe": {"steps": [LOCATE, SELECT, TUNE, {**AUDIT, "probes": ["stranger.loss"]}]},
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_file_runs_no_code_but_neurograft_s(what, spy, tmp_path):
    net = pico("llama")
    with pytest.raises(RequestError, match=r"the name 'stranger\.\w+' in a recipe file.*trust='stranger'"):
        ng.run(written(tmp_path, FILES[what]), net, [pico_batch(net)])
    assert not spy.exists()
    assert "stranger" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "neurograft.core.resolve.resolve",
        "neurograft.pipeline.locate.choose",
        "neurograft.pipeline.run.Path",
        "neurograft.locators._common.scored",
        "neurograft.locators.magnitude.__builtins__",
        "neurograft.locators.magnitude.torch",
        "neurograft.cli.main",
    ],
)
def test_what_modules_of_neurograft_import_or_keep_to_themselves_is_no_method(name):
    with trusting([]), pytest.raises(RequestError, match="in a recipe file"):
        asked(name)


def test_whoever_runs_a_file_may_trust_more(spy, tmp_path):
    net, step = pico("llama"), {"steps": [{"do": "stranger.step", "x": 1}]}
    for trust in ("stranger", ["stranger.step"]):
        assert ng.run(written(tmp_path, step), net, trust=trust).state["seen"] == {"x": 1}
    for trust in ("strange", "stranger.ste", "stranger.step.x", ["other"]):
        with pytest.raises(RequestError, match="in a recipe file"):
            ng.run(written(tmp_path, step), net, trust=trust)


def test_what_one_names_oneself_needs_no_trust(spy, tmp_path):
    net = pico("llama")
    mine = {"locate.by": "stranger.locator"}
    assert len(ng.run(written(tmp_path, {"steps": [LOCATE]}), net, changes=mine).scores.values) == 2
    made = Recipe("mine", ({"do": "stranger.step", "x": 2},))
    assert ng.run(made, net).state["seen"] == {"x": 2}
    assert ng.run("stranger.made", net).scores.values
    with pytest.raises(RequestError, match="no recipe file"):
        ng.run(made, net, trust="stranger")


def test_trust_ends_with_the_run(spy, tmp_path):
    net = pico("llama")
    with pytest.raises(RequestError, match="in a recipe file"):
        ng.run(written(tmp_path, FILES["a step"]), net)
    assert asked("stranger.step").__name__ == "step"


def test_every_method_and_every_step_of_a_recipe_may_stand_in_a_file():
    with trusting([]):
        for room in ROOMS:
            for name in methods(room):
                if callable(resolve(f"neurograft.{room}.{name}")):  # some files of networks hold parts alone
                    assert choose(room, f"neurograft.{room}.{name}").name
        for name in recipes():
            for step in recipe(name).steps:
                assert "." not in step["do"] or asked(step["do"])


def test_a_file_may_name_the_model_and_can_be_planned(tmp_path):
    pico("llama").save_pretrained(tmp_path / "model")
    file = written(tmp_path, {"steps": [LOCATE, SELECT, TUNE], "model": str(tmp_path / "model")})
    plan = ng.plan(tmp_path / "model", file)
    assert plan["units"]["chosen"] == 2
    with pytest.raises(RequestError, match="no model"):
        ng.run(written(tmp_path, {"steps": [LOCATE]}))
    file = written(tmp_path, {"steps": [LOCATE], "model": str(tmp_path / "model")})
    assert ng.run(file).scores.values


def test_the_command_line_says_how_to_trust(spy, tmp_path):
    pico("llama").save_pretrained(tmp_path / "model")
    file = written(tmp_path, {"steps": [{**LOCATE, "by": "stranger.locator"}]})
    status, _, errors = command("run", file, tmp_path / "model")
    assert (status, "--trust stranger" in errors, spy.exists()) == (2, True, False)
    status, _, errors = command("run", file, tmp_path / "model", "--trust", "stranger")
    assert (status, spy.exists()) == (0, True), errors


def test_a_step_with_arguments_it_does_not_take_or_that_returns_no_state_is_a_request(spy):
    net = pico("llama")
    with pytest.raises(RequestError, match=r"the argument 'of_what' of neurograft\.pipeline\.summed"):
        ng.run(Recipe("r", ({"do": "neurograft.pipeline.summed", "of_what": ["a"]},)), net)
    with pytest.raises(RequestError, match="returned a list"):
        ng.run(Recipe("r", ({"do": "stranger.listed"},)), net)
