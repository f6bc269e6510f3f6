"""Reading data: anything a user may hand over becomes a list of rows or a list of ready batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from neurograft.core.errors import RequestError, near

Row = dict[str, Any]
FILES = (".jsonl", ".json", ".parquet", ".npz", ".safetensors")


def read_rows(data: Any, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Return data as rows: dicts of one example each, or dicts of ready batches of tensors.

    Args:
        data: an iterable of dicts, a DataLoader, a `datasets.Dataset`, the path of a JSONL, JSON, parquet,
            npz or safetensors file (arrays share their first axis), or a Hub id.
        split: the split of a Hub data set.
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
        readers = {
            ".jsonl": _json_lines,
            ".json": _json,
            ".parquet": _parquet,
            ".npz": _arrays,
            ".safetensors": _arrays,
        }
        if path.suffix not in readers:
            how = f"pandas.read_csv({name!r}).to_json({path.stem + '.jsonl'!r}, orient='records', lines=True)"
            raise RequestError(
                f"the data file {name}",
                expected=f"one of {', '.join(FILES)}",
                do="convert it to JSONL" + (f": {how}" if path.suffix == ".csv" else ""),
            )
        return readers[path.suffix](path)
    if path.suffix in FILES or name.startswith((".", "/", "~")) or name.count("/") != 1:
        beside = [p.name for p in path.parent.iterdir() if p.suffix in FILES] if path.parent.is_dir() else []
        raise RequestError(
            f"the data {name!r}, where no file is", expected="a data file or a Hub id", do=near(path.name, beside)
        )
    return _hub(name, split)


def _hub(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        found: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds for a name that cannot be had
        raise RequestError(
            f"the data set {name!r} ({type(error).__name__})",
            expected="a reachable data set on the Hub, or a file",
            do="check the name and the connection, or give a local JSONL file",
        ) from error
    return found


def _json_lines(path: Path) -> Iterable[Mapping[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # also bytes that are no UTF-8
                raise RequestError(
                    f"line {number} of {path}, which is no JSON ({error})",
                    expected="one JSON object a line, in UTF-8",
                    do=f"mend or delete line {number}",
                ) from error
            if not isinstance(row, dict):
                raise RequestError(
                    f"line {number} of {path}, a {type(row).__name__}",
                    expected="one JSON object a line",
                    do='write {"text": ...}',
                )
            yield row


def _json(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(
            f"{path}, which is no JSON ({error})", expected="a list of objects", do="mend it there, or write JSONL"
        ) from error
    if not isinstance(found, list):
        raise RequestError(
            f"{path}, a JSON {type(found).__name__}", expected="a list of objects", do="write JSONL instead"
        )
    return found


def _parquet(path: Path) -> Iterable[Mapping[str, Any]]:
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(
            f"{path}, which cannot be read as parquet ({error})", expected="a parquet file", do="write it again"
        ) from error


def _arrays(path: Path) -> Iterable[Mapping[str, Any]]:
    arrays: dict[str, Tensor]
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {k: torch.from_numpy(file[k]) for k in file.files}
        except (ValueError, TypeError, EOFError, OSError, BadZipFile) as error:
            raise RequestError(
                f"{path}, whose arrays cannot be read ({error})",
                expected="arrays of numbers",
                do="store numbers alone; pickled objects are never read",
            ) from error
    else:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            arrays = load_file(path)
        except SafetensorError as error:
            raise RequestError(
                f"{path}, which is no safetensors file ({error})", expected="arrays of numbers", do="write it again"
            ) from error
    lengths = {k: len(v) if v.dim() else 0 for k, v in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(v.dim() for v in arrays.values()):
        raise RequestError(
            f"{path} with arrays of lengths {lengths}",
            expected="one first axis for all arrays",
            do="store one entry for each example in every array",
        )
    return [{k: v[i] for k, v in arrays.items()} for i in range(next(iter(lengths.values())))]
