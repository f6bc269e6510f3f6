"""The words that stand without a name on the command line: a model, data, and what earlier commands wrote."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def word(name: str, text: str, kind: Any = str) -> Any:
    """Return the annotation of a word.

    Args:
        name: what it is called in help texts, in brackets if it may be left out.
        text: what it is.
        kind: its type.
    """
    return Annotated[kind, typer.Argument(metavar=name, help=text)]


_MODEL = "A model folder, a Hub id, or a shipped model."
_DATA = "A JSONL, JSON, CSV, text, Parquet, Arrow, npz or safetensors file, a saved data set, or a Hub id"
MODEL, MAYBE_MODEL, BASE = word("MODEL", _MODEL), word("[MODEL]", _MODEL, str | None), word("BASE", _MODEL)
DATA = word("DATA", f"{_DATA}.")
MAYBE_DATA = word("[DATA]", f"{_DATA}; methods that only read weights need none.", str | None)
REQUESTS = word("REQUESTS", "A JSONL file: prompt, subject, target_new (+ rephrase, locality).")
SCORES = word("SCORES", "A file that `locate` wrote.")
SELECTION = word("SELECTION", "A file that `select` wrote.")
GRAFT, GRAFTS = word("GRAFT", "The folder of a graft."), word("GRAFT...", "Folders of grafts.", list[str])
EDITS = word("EDIT...", "Edits by place (from 0), prompt or subject.", list[str])
TUNED = word("TUNED", "A graft's folder, or the tuned model: a folder, also a PEFT adapter's, or a Hub id.")
UNIT = word("UNIT", "SITE:ID, as in model.layers.1.mlp/neuron:37.")
RECIPE = word("RECIPE", "A recipe's name, or a file that `select` wrote.")
ABOUT = word("[ABOUT]", "A slug, or a word of title, slug or room.", str | None)
SOURCE = word("SOURCE", "A graft's folder, a recipe's name or a paper's slug.")
RUN = word(
    "RECIPE [MODEL] [DATA] [KEY=VALUE...]",
    "A recipe, what it runs on, and changes to its options; `neurograft run RECIPE --help` lists them.",
    list[str],
)
