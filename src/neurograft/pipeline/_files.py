"""One reader for each kind of data file; every one of them gives rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from neurograft.core.errors import RequestError

Rows = Iterable[Mapping[str, Any]]
NUMBERS = ("label", "labels")  # columns of a table of text that hold numbers, if all that stands in them is one
SAVED = ("state.json", "dataset_dict.json")  # what `datasets` writes into a folder it saves


def json_lines(path: Path) -> Rows:
    """Read one JSON object a line; empty lines are passed over."""
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


def json_list(path: Path) -> Rows:
    """Read a JSON list of objects."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise RequestError(
            f"{path}, which is no JSON ({error})", expected="a list of objects", do="mend it there, or write JSONL"
        ) from error
    if not isinstance(found, list):
        lists = [k for k, v in found.items() if isinstance(v, list)] if isinstance(found, dict) else []
        raise RequestError(
            f"{path}, a JSON {'object' if isinstance(found, dict) else type(found).__name__}",
            expected="a list of objects, [{...}, {...}]",
            do=f"write the list under {lists[0]!r} alone" if lists else "put it in brackets, or write JSONL",
        )
    return found


def lines(path: Path) -> Rows:
    """Read plain text: every line that is not empty is a row `{"text": line}`."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            for line in file:
                if line.strip():
                    yield {"text": line.rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{path}, which is no text ({error})", expected="text in UTF-8", do="encode it"
            ) from error


def table(path: Path) -> Rows:
    """Read a table with a head, commas between cells in .csv and tabs in .tsv.

    Cells are text, digits too, for a model reads text; only under `label` and `labels` a number is a number and an
    empty cell nothing.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        found = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            head = next(found, [])
            if len(set(head)) != len(head) or (len(head) == 1 and ";" in head[0]):
                raise RequestError(
                    f"{path} with the head {head}", expected="one name for each column, commas between",
                    do="write it with commas and names in the first line",
                )  # fmt: skip
            for cells in found:
                if cells and len(cells) != len(head):
                    raise RequestError(
                        f"line {found.line_num} of {path} with {len(cells)} cells",
                        expected=f"{len(head)}, one for each of {', '.join(head)}",
                        do="put texts with commas or line ends in double quotes",
                    )
                if cells:
                    yield {name: _number(cell) if name in NUMBERS else cell for name, cell in zip(head, cells)}
        except (csv.Error, UnicodeDecodeError) as error:
            raise RequestError(
                f"{path}, which cannot be read as a table ({error}, line {found.line_num})",
                expected="a table in UTF-8, its first line the columns' names",
                do="mend it there, or write JSONL",
            ) from error


def _number(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None


def parquet(path: Path) -> Rows:
    """Read a Parquet file, a batch of rows at a time."""
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(
            f"{path}, which cannot be read as parquet ({error})", expected="a parquet file", do="write it again"
        ) from error


def arrow(path: Path) -> Rows:
    """Read an Arrow file, of streams as `datasets` writes them or of the file format (Feather)."""
    import pyarrow

    try:
        with pyarrow.OSFile(str(path)) as file:
            ends = file.read(6) == b"ARROW1"
            file.seek(0)
            if ends:
                opened = pyarrow.ipc.open_file(file)
                batches: Iterable[Any] = (opened.get_batch(i) for i in range(opened.num_record_batches))
            else:
                batches = pyarrow.ipc.open_stream(file)
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(
            f"{path}, which cannot be read as Arrow ({error})", expected="an Arrow file", do="write it again"
        ) from error


def arrays(path: Path) -> Rows:
    """Read arrays that share their first axis, of .npz or .safetensors; pickled ones never."""
    found: dict[str, Tensor]
    if path.suffix.lower() == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {k: torch.from_numpy(file[k]) for k in file.files}
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
            found = load_file(path)
        except SafetensorError as error:
            raise RequestError(
                f"{path}, which is no safetensors file ({error})", expected="arrays of numbers", do="write it again"
            ) from error
    lengths = {k: len(v) if v.dim() else 0 for k, v in found.items()}
    if len(set(lengths.values())) != 1 or not all(v.dim() for v in found.values()):
        raise RequestError(
            f"{path} with arrays of lengths {lengths}",
            expected="one first axis for all arrays",
            do="store one entry for each example in every array",
        )
    return [{k: v[i] for k, v in found.items()} for i in range(next(iter(lengths.values())))]


def saved(folder: Path, split: str) -> Rows:
    """Read a folder that `datasets` saved.

    Raises:
        RequestError: it lacks the split, or cannot be read.
    """
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(
            f"the folder {folder}, which `datasets` cannot read ({error})", expected="a saved data set",
            do="save it again with save_to_disk",
        ) from error  # fmt: skip
    if isinstance(found, Mapping):
        if split not in found:
            raise RequestError(
                f"the data set {folder} without a split {split!r}", expected=f"one of {', '.join(found)}",
                do=f"name the folder of one: {folder / next(iter(found), 'train')}",
            )  # fmt: skip
        found = found[split]
    return found


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": json_lines, ".ndjson": json_lines, ".json": json_list, ".csv": table, ".tsv": table, ".txt": lines,
    ".parquet": parquet, ".arrow": arrow, ".feather": arrow, ".npz": arrays, ".safetensors": arrays,
}  # fmt: skip
