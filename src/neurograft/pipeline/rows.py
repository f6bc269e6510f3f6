"""Reading data: anything a user may hand over becomes a list of rows or a list of ready batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from neurograft.core.errors import RequestError, near
from neurograft.pipeline._files import READERS, SAVED, saved
from neurograft.pipeline._hub import cut_off

Row = dict[str, Any]


def read_rows(data: Any, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Return data as rows: dicts of one example each, or dicts of ready batches of tensors.

    Args:
        data: an iterable of dicts, a DataLoader, a `datasets.Dataset`, a Hub id, or a path: a JSONL or JSON file,
            a CSV or TSV table with a head (cells are text; numbers only under `label`), plain text (a row for every
            line), a Parquet or Arrow file, an npz or safetensors file (arrays share their first axis), or a folder
            that `datasets` saved.
        split: the split of a Hub data set, or of a saved folder that holds several.
        limit: read at most so many.

    Raises:
        RequestError: no such file, an unknown format, a line that is no JSON object, or no row at all.

    Example:
        >>> read_rows([{"text": "a"}, {"text": "b"}], limit=1)
        [{'text': 'a'}]
    """
    source = "data"
    if isinstance(data, (str, Path)):
        source, data = str(data), _opened(Path(data), str(data), split)
    if isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise RequestError(
            f"data of type {type(data).__name__}",
            expected="an iterable of dicts, a Dataset, a DataLoader, a file or a Hub id",
            do="give a list of dicts such as {'text': ..., 'label': ...}",
        )
    rows: list[Row] = []
    for i, row in enumerate(data):
        if limit is not None and i >= limit:
            break
        if not isinstance(row, Mapping) and not hasattr(row, "keys"):
            raise RequestError(
                f"row {i} of type {type(row).__name__}", expected="a dict", do="give one dict for each example"
            )
        rows.append({str(k): row[k] for k in row.keys()})  # noqa: SIM118
    if not rows:
        raise RequestError(f"no rows in {source}", expected="at least one example", do="check the file or the iterator")
    return rows


def _opened(path: Path, name: str, split: str) -> Iterable[Mapping[str, Any]]:
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise RequestError(
                f"the data file {name}", expected=f"one of {', '.join(READERS)}", do="convert it to one of them"
            )
        return READERS[path.suffix.lower()](path)
    if path.is_dir():
        if any((path / file).is_file() for file in SAVED):
            return saved(path, split)
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in READERS)
        raise RequestError(
            f"the folder {name} for data",
            expected="a data file, or a folder that `datasets` saved",
            do=f"name a file in it, such as {path / inside[0]}" if inside else "name a file",
        )
    if path.suffix in READERS or name.startswith((".", "/", "~")) or name.count("/") != 1:
        beside = [p.name for p in path.parent.iterdir() if _readable(p)] if path.parent.is_dir() else []
        raise RequestError(
            f"the data {name!r}, where no file is", expected="a data file or a Hub id", do=near(path.name, beside)
        )
    return _hub(name, split)


def _readable(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in READERS


def _hub(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        kept = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
        if not kept.exists() and cut_off(name, file="README.md", kind="dataset"):
            raise ConnectionError
        found: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds for a name that cannot be had
        raise RequestError(
            f"the data set {name!r} ({type(error).__name__})",
            expected="a reachable data set on the Hub, or a file",
            do="check the name and the connection, or give a local JSONL file",
        ) from error
    return found
