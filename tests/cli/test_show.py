"""Results in terminals of any width, with colours and without."""

import re

import pytest
from rich.console import Console

from neurograft.cli.show import Shown, table_of

ROWS = [
    {"name": "block_expansion", "proof": "tiny", "title": "Parameter Efficient Fine-tuning without Forgetting"},
    {"name": "s2ft", "proof": None, "title": "Efficient, scalable and generalizable fine-tuning by sparsity"},
]


def shown(rows, width, monkeypatch, **options):
    made = Shown(as_json=False)
    monkeypatch.setattr(made, "console", Console(highlight=False, soft_wrap=True, width=width, **options))
    with made.console.capture() as text:
        made.result({}, table=table_of(rows))
    return text.get()


def test_a_wide_terminal_has_a_table(monkeypatch):
    text = shown(ROWS, 120, monkeypatch)
    assert [line.split()[0] for line in text.splitlines() if line.strip()][:1] == ["name"]
    assert "name: " not in text


def test_in_a_narrow_terminal_prose_is_not_cut_into_a_column_of_syllables(monkeypatch):
    text = shown(ROWS, 40, monkeypatch)
    lines = text.splitlines()
    assert lines[0].rstrip() == "block_expansion"
    assert lines[1].rstrip() == "  proof: tiny"
    assert "  proof: -" in [line.rstrip() for line in lines]
    assert " ".join(text.split()).count("title: ") == 2
    assert "Fine-tuning without Forgetting" in " ".join(text.split())


def test_a_table_that_nearly_fits_stays_one(monkeypatch):
    rows = [{"site": "model.layers.0.mlp/neuron", "unit": 35, "score": 0.00381}]
    text = shown(rows, 40, monkeypatch)
    assert "site" in text.splitlines()[1]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_without_colours_none_is_written(width, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(ROWS, width, monkeypatch, force_terminal=True)
    assert not re.search("\x1b\\[[34]\\dm", text)
    plain = re.sub("\x1b\\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= width
