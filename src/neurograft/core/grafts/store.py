"""Graft folders: `graft.json` and `graft.safetensors`, verified on reading, atomic on writing, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import canonical
from neurograft.core.grafts.contents import Contents
from neurograft.core.grafts.packing import FORMAT, packed, unpacked

TEXT, TENSORS = "graft.json", "graft.safetensors"


def save(graft: Contents, folder: Path) -> Path:
    """Write a graft's folder; an older graft there is replaced, anything else is left alone.

    Raises:
        RequestError: the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"the path {folder}, a file", expected="a folder", do="choose another path")
    tensors, text = packed(graft)
    text, fresh = _plain(text), not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Inside of the folder: it may be a mount or a link to another disk, where nothing can be moved from beside it.
    work = Path(tempfile.mkdtemp(prefix=".graft.", dir=folder))
    try:
        save_file(apart(tensors), work / TENSORS, metadata={"format": "pt"})  # one key: their order is random
        text["tensors_sha256"] = _file_digest(work / TENSORS)
        text["digest"] = hashlib.sha256(canonical(text)).hexdigest()
        (work / TEXT).write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
        for name in (TENSORS, TEXT):
            with open(work / name, "rb") as file:
                os.fsync(file.fileno())
        shutil.copymode(work / TEXT, work / TENSORS)  # safetensors writes files that only their owner may read
        # The text names the tensor file's digest: whatever is interrupted, a mixture is refused on reading.
        os.replace(work / TENSORS, folder / TENSORS)
        os.replace(work / TEXT, folder / TEXT)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if fresh and not any(folder.iterdir()):
            folder.rmdir()
    return folder


def load(source: str | Path, *, revision: str | None = None) -> Contents:
    """Read and verify a graft's folder, local or on the Hub.

    Raises:
        RequestError: nothing is there, a file is truncated or was changed, its format is newer, or it holds an
            operation whose package is not imported.
    """
    folder = _local(source, revision)
    text = _read_text(folder / TEXT)
    if _file_digest(folder / TENSORS) != text.get("tensors_sha256"):
        raise _changed(folder / TENSORS, "its bytes do not match the digest in graft.json")
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _changed(folder / TENSORS, str(error)) from error
    try:
        return unpacked(text, tensors)
    except RequestError:
        raise
    except (LookupError, TypeError, AttributeError, AssertionError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _changed(folder / TEXT, f"it lacks or spoils {error}") from error


def push(graft: Contents, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a graft's folder to the Hub."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = str(api.create_repo(repo_id, private=private, exist_ok=True))
    with tempfile.TemporaryDirectory() as work:
        api.upload_folder(repo_id=repo_id, folder_path=save(graft, Path(work) / "graft"))
    return address


def _local(source: str | Path, revision: str | None) -> Path:
    folder = Path(source)
    if (folder / TEXT).is_file():
        return folder
    if folder.exists():
        adapter = (folder / "adapter_config.json").is_file()
        raise RequestError(
            f"the folder {folder}" + (", a PEFT adapter" if adapter else ""),
            expected=f"a graft: {TEXT} and {TENSORS}",
            do="make it a graft: ng.diff(base, folder)" if adapter else "give the folder that graft.save wrote",
        )
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise RequestError(
            f"the path {name!r}, which does not exist",
            expected="a graft folder or a Hub repository",
            do="check the path",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[TEXT, TENSORS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RequestError(
            f"{name!r}, neither a folder nor a reachable Hub repository",
            expected="a graft folder or a Hub repository",
            do="check the path, or the connection to the Hub",
        ) from error


def _read_text(path: Path) -> dict[str, Any]:
    try:
        text: dict[str, Any] = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise _changed(path, "it is not JSON") from error
    if not isinstance(text, dict) or not isinstance(text.get("format"), int):
        raise _changed(path, "it has no format number")
    if text["format"] > FORMAT:
        raise RequestError(
            f"a graft of format {text['format']}",
            expected=f"format {FORMAT} or older",
            do="upgrade neurograft: pip install -U neurograft",
        )
    body = {k: v for k, v in text.items() if k != "digest"}
    if hashlib.sha256(canonical(body)).hexdigest() != text.get("digest"):
        raise _changed(path, "its content does not match its own digest")
    return text


def _changed(path: Path, why: str) -> RequestError:
    return RequestError(
        f"{path}, truncated or changed ({why})",
        expected="the file as graft.save wrote it",
        do="copy or download it again",
    )


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise _changed(path, "it is missing")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(text: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader of the file will see: its digest is of that, and JSON turns numbers that are keys into text.

    Raises:
        RequestError: the card holds something that JSON cannot.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(text))
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"a graft whose card is no plain data ({error})",
            expected="text, numbers, lists and mappings",
            do="put str(...) or .tolist() of it on the card",
        ) from error
    return found


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors wants them: what two names hold is copied for the second."""
    seen: set[int] = set()
    made = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return made
