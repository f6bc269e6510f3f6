"""The generated pages are those the code gives."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_generated_pages_are_current():
    pages = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    stale = [path for path, text in pages.items() if not (DOCS / path).is_file() or (DOCS / path).read_text() != text]
    assert not stale, "run `make docs`"
    there = {f"{folder}/{p.name}" for folder in ("methods", "papers") for p in (DOCS / folder).glob("*.md")}
    assert there == {path for path in pages if "/" in path}


def test_docstrings_are_taken_apart():
    sections = runpy.run_path(str(DOCS / "generate.py"))["sections"]
    prose, arguments = sections("Do it.\n\nArgs:\n    a: first,\n        and more.\n    b: second.\n\nReturns:\n    c.")
    assert prose == "Do it."
    assert arguments == {"a": "first, and more.", "b": "second."}
