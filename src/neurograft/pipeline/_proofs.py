"""The record of the proofs: what was shown, with which files, and whether those files are still the same.

`python -m tests.proofs` writes it; the package ships it, so that `papers` can say what holds for this very code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
RECORD = PACKAGE / "pipeline" / "proofs.json"
TESTS = PACKAGE.parents[1] / "tests" / "proofs"
FORMAT = 1


def read(path: Path = RECORD) -> dict[str, dict[str, Any]]:
    """Return slug -> what was recorded of its proof; empty if nothing was."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["proofs"]
    return found


def write(proofs: Mapping[str, Mapping[str, Any]], path: Path = RECORD) -> None:
    """Write the record, sorted by slug, whole or not at all."""
    text = json.dumps({"format": FORMAT, "proofs": dict(sorted(proofs.items()))}, indent=1, sort_keys=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def file_digest(path: Path) -> str:
    """Return a short digest of a text file, blind to line ends; "missing" if there is none."""
    if not path.is_file():
        return "missing"
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]


def digests(files: list[str]) -> dict[str, str]:
    """Return the digests of files of this package, by path inside it."""
    return {name: file_digest(PACKAGE / name) for name in sorted(files)}


def changed(record: Mapping[str, Any], digest: Callable[[Path], str] = file_digest) -> list[str]:
    """Return which files of a proof differ from those it ran through.

    The test itself counts where it can be seen: an installed package is shipped without its tests. `digest` is
    `file_digest`, or one that remembers: who asks for many proofs meets the same files in most of them.
    """
    odd = [name for name, known in record["files"].items() if digest(PACKAGE / name) != known]
    if TESTS.is_dir():
        odd += [name for name, known in record["tests"].items() if digest(TESTS / name) != known]
    return odd


def standing(record: Mapping[str, Any] | None, digest: Callable[[Path], str] = file_digest) -> str:
    """Say how a proof stands; `digest` as for `changed`.

    "passing": it passed, every sabotage made it fail, and nothing it ran through has changed; "stale": so it was,
    but something has changed since; "failing"; "toothless": it passed under a sabotage; "none".
    """
    if record is None:
        return "none"
    if not record["passed"]:
        return "failing"
    if not record["broken"] or not all(record["broken"].values()):
        return "toothless"
    return "stale" if changed(record, digest) else "passing"
