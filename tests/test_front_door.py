"""The front door: what may be called, with which words, and what importing it costs."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import neurograft as ng

SOURCE = Path(ng.__file__).parent

# The contract. A keyword may be added; one that is here may not go.
SIGNATURES = {
    "locate": "model data by units at objective target positions layers against processing_class seed",
    "select": "scores by fraction count per",
    "evidence": "model where data",
    "tune": "model data where adapter objective anchor schedule optimizer protect eval_dataset processing_class "
    "data_collator compute_metrics args callbacks resume_from_checkpoint seed",
    "audit": "model graft gain keep metrics probes processing_class rules seed",
    "attach": "model where adapter",
    "intervene": "model where",
    "diff": "base tuned",
    "recipe": "name",
    "run": "recipe model data",
    "plan": "model recipe",
    "papers": "",
    "neuron": "model unit data",
}


@pytest.mark.parametrize("verb", SIGNATURES)
def test_every_verb_keeps_its_words(verb):
    parameters = inspect.signature(getattr(ng, verb)).parameters
    missing = set(SIGNATURES[verb].split()) - parameters.keys()
    assert not missing


def test_every_public_name_is_there_and_described():
    for name in ng.__all__:
        found = getattr(ng, name)
        assert name == "__version__" or (found.__doc__ or "").strip()


GRAFT = "on apply remove scale save load save_pretrained from_pretrained push_to_hub export __add__"


@pytest.mark.parametrize("name", GRAFT.split())
def test_grafts_do_what_the_contract_says(name):
    assert callable(getattr(ng.Graft, name))


def test_importing_it_brings_nothing_heavy():
    heavy = ("torch", "transformers", "numpy")
    code = f"import sys, neurograft, neurograft.cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_verbs_of_later_versions_say_so_and_misspelt_ones_are_plain_errors():
    with pytest.raises(AttributeError, match="merge comes with a later version"):
        _ = ng.merge
    with pytest.raises(AttributeError, match=r"no attribute 'locte'$"):
        _ = ng.locte
    assert not hasattr(ng, "__wrapped__")


QUICK = ["--help", "locate --help", "tune --help", "audit --nonsense", "run s2ft --help", "papers", "cite s2ft"]


@pytest.mark.parametrize("words", QUICK)
def test_help_mistyped_options_and_the_papers_need_no_torch(words):
    code = f"import sys; from neurograft.cli import main; sys.argv = ['neurograft', *{words.split()}]\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print('heavy:', [*{'torch', 'transformers', 'numpy'} & {*sys.modules}])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in found.stdout


def test_rooms_have_inits_without_code_and_no_module_bears_a_verbs_name():
    for init in SOURCE.glob("*/**/__init__.py"):
        code = [n for n in ast.parse(init.read_text()).body if not isinstance(n, ast.Expr)]
        assert init.parent.name == "cli" or not code, init
    assert not {p.stem for p in SOURCE.iterdir()} & SIGNATURES.keys()


# What lower layers may reach upward for, by dotted name: nothing else in core names a room.
UPWARD = {
    "neurograft.anatomy.checkpoint.CheckpointMap",
    "neurograft.selectors.top",
    "neurograft.selectors.bottom",
    "neurograft.export.",  # Graft.export
    "neurograft.export._changes.base_model",  # Graft.materialize: the base named on the card
    "neurograft.",  # core.choose: a method of a room
}


def test_core_reaches_upward_only_through_resolve():
    given = set()
    for file in (SOURCE / "core").rglob("*.py"):
        text = file.read_text()
        given |= set(re.findall(r"""resolve\(\s*f?["']([\w.]+)""", text))
        given |= set(re.findall(r"""dotted = .*?f["'](neurograft\.)""", text))
    assert given - {"neurograft.core.resolve"} <= UPWARD


def test_the_library_prints_nothing():
    for file in SOURCE.rglob("*.py"):
        assert not re.search(r"^\s*print\(", file.read_text(), re.M), file
