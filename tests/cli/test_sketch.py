"""What the command line says of a verb before importing it is what the verb says."""

import inspect
import sys

import pytest

from neurograft.cli.commands import VERBS
from neurograft.cli.sketch import definition, sketch
from neurograft.core.resolve import resolve


@pytest.mark.parametrize("dotted", [row[0] for row in VERBS.values()])
def test_a_sketch_has_the_signature_and_the_docstring_of_its_verb(dotted):
    made, verb = sketch(dotted), resolve(dotted)
    assert inspect.signature(made) == inspect.signature(verb)
    assert made.__doc__ == verb.__doc__


def test_a_sketch_calls_its_verb():
    assert sketch("neurograft.pipeline.papers.cite")("smt") == resolve("neurograft.pipeline.papers.cite")("smt")


def test_a_default_that_is_no_literal_needs_the_verb_itself(tmp_path, monkeypatch):
    source = "MOST = 3\ndef odd(n: int = MOST) -> int:\n    return n\n"
    monkeypatch.setattr("neurograft.cli.sketch.ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "odd.py").write_text(source)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "odd.py").write_text(source)
    (tmp_path / "strange" / "__init__.py").touch()
    assert definition("strange.odd") is not None
    assert inspect.signature(sketch("strange.odd")).parameters["n"].default == 3
    for name in ("odd", "strange", "strange.odd"):
        sys.modules.pop(name, None)


def test_a_verb_of_a_later_version_has_no_definition():
    assert definition("neurograft.pipeline.merge") is None
