"""Checkpoints of a training: the compact tensors, and a mark that says the folder is complete."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurograft.core.compact.mount import Mount
from neurograft.core.errors import RequestError

TENSORS, STATE, MARK = "neurograft.safetensors", "neurograft.json", "neurograft.complete.json"
FORMAT = 1
_FOLDER = re.compile(r"^checkpoint-(\d+)$")


def write(folder: Path, mount: Mount, state: Mapping[str, Any]) -> None:
    """Write a mount's trainable tensors, exactly, and plain data beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    tensors = {n: t.cpu().contiguous() for n, t in mount.state_dict().items()}
    save_file(tensors, folder / TENSORS, metadata={"neurograft": "training"})
    _write_json(folder / STATE, {"format": FORMAT, **state})


def read(folder: Path, mount: Mount) -> dict[str, Any]:
    """Put a checkpoint's tensors into the mount and return the plain data beside them.

    Raises:
        RequestError: no such checkpoint, a newer format, or one of another selection.
    """
    if not (folder / TENSORS).is_file():
        raise RequestError(
            f"the checkpoint {folder}, without {TENSORS}",
            expected="a checkpoint written by GraftTrainerMixin",
            do="resume with the trainer class that wrote it",
        )
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    if state.get("format", 0) > FORMAT:
        raise RequestError(
            f"a checkpoint of format {state['format']}", expected=f"format {FORMAT}", do="update neurograft"
        )
    mount.load_state_dict(tensors(folder))
    return state


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def mark(folder: Path) -> None:
    """Say that every file of a checkpoint is written: the last thing done to it, atomically."""
    files = {
        str(p.relative_to(folder)): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARK
    }
    _write_json(folder / MARK, {"format": FORMAT, "files": files})


def fault(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None if it is whole.

    A checkpoint is whole if it carries the mark and every file the mark names has the digest it had.
    """
    if not (folder / MARK).is_file():
        return "it was not finished: the mark of completeness is missing"
    try:
        files = json.loads((folder / MARK).read_text())["files"]
    except (ValueError, KeyError):
        return "its mark of completeness cannot be read"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} was truncated or changed"
    return None


def newest(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest whole checkpoint of a run, and what is wrong with the newer ones that are not."""
    numbered = {int(m[1]): p for p in folder.iterdir() if (m := _FOLDER.match(p.name))} if folder.is_dir() else {}
    skipped: dict[str, str] = {}
    for _, path in sorted(numbered.items(), reverse=True):
        why = fault(path)
        if why is None:
            return path, skipped
        skipped[path.name] = why
    return None, skipped


def to_resume(asked: Any, output_dir: str | Path) -> tuple[Path | None, dict[str, str]]:
    """Return the checkpoint to resume from, and what was skipped.

    Args:
        asked: None or False for none, True for the newest whole one, or a folder.
        output_dir: where the run writes.

    Raises:
        RequestError: the folder asked for is not whole, or the run has checkpoints and none of them is.
    """
    if asked is None or asked is False:
        return None, {}
    if asked is not True:
        why = fault(Path(asked))
        if why is not None:
            raise RequestError(
                f"the checkpoint {asked}: {why}",
                expected="a complete checkpoint",
                do="pass resume_from_checkpoint=True to take the newest complete one",
            )
        return Path(asked), {}
    found, skipped = newest(Path(output_dir))
    if found is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise RequestError(
            f"resume_from_checkpoint=True with no complete checkpoint in {output_dir}"
            + (f" ({reasons})" if reasons else ""),
            expected="at least one complete checkpoint",
            do="start anew without resume_from_checkpoint",
        )
    return found, skipped


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        json.dump(data, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
