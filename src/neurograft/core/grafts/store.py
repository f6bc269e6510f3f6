"""Graft folders: `graft.json` and `graft.safetensors`, verified on reading, atomic on writing, never a pickle."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import canonical
from neurograft.core.grafts.delta import Delta, LowRank, New, Shut, Slice
from neurograft.core.grafts.replay import Log, Replay
from neurograft.core.region import Region
from neurograft.core.resolve import resolve

if TYPE_CHECKING:
    from neurograft.core.grafts.graft import Graft

FORMAT = 1
TEXT, TENSORS = "graft.json", "graft.safetensors"


def save(graft: Graft, folder: Path) -> Path:
    """Write a graft's folder; an older graft there is replaced, anything else is left alone.

    Raises:
        RequestError: the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"the path {folder}, a file", expected="a folder", do="choose another path")
    tensors, text = _pack(graft)
    text = _plain(text)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(apart(tensors), work / TENSORS, metadata={"format": "pt"})  # one key: their order is random
        text["tensors_sha256"] = _file_digest(work / TENSORS)
        text["digest"] = hashlib.sha256(canonical(text)).hexdigest()
        (work / TEXT).write_text(json.dumps(text, indent=1, sort_keys=True) + "\n")
        for name in (TENSORS, TEXT):
            with open(work / name, "rb") as file:
                os.fsync(file.fileno())
        folder.mkdir(exist_ok=True)
        shutil.copymode(work / TEXT, work / TENSORS)  # safetensors writes files that only their owner may read
        # The text names the tensor file's digest: whatever is interrupted, a mixture is refused on reading.
        os.replace(work / TENSORS, folder / TENSORS)
        os.replace(work / TEXT, folder / TEXT)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def load(source: str | Path, *, revision: str | None = None) -> Graft:
    """Read and verify a graft's folder, local or on the Hub.

    Raises:
        RequestError: nothing is there, a file is truncated or was changed, its format is newer, or it holds an
            operation whose package is not imported.
    """
    from neurograft.core.grafts.graft import Graft

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
        logs = [_log(i, made, tensors) for i, made in enumerate(text.get("logs", ()))]
        deltas = {name: _unpack(name, entry, tensors, logs) for name, entry in text["tensors"].items()}
        operations = tuple(_operation(i, meta, tensors) for i, meta in enumerate(text["operations"]))
        return Graft(deltas, operations, text["base"], text["card"], text["strength"])
    except RequestError:
        raise
    except (KeyError, TypeError, AttributeError, AssertionError, ValueError, IndexError, OverflowError) as error:
        raise _changed(folder / TEXT, f"it lacks or spoils {error}") from error


def _operation(i: int, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Read an operation. A file may name classes of this library, or of a package that is imported already."""
    module = str(meta["type"]).rpartition(".")[0]
    if not module.startswith("neurograft.") and module not in sys.modules:
        raise RequestError(
            f"a graft with an operation of {module!r}, which is not imported",
            expected="operations of neurograft, or of packages you use",
            do=f"import {module.partition('.')[0]} first, if you trust it",
        )
    kind = resolve(meta["type"])
    made: Any = kind if inspect.isclass(kind) else None
    if not all(hasattr(made, word) for word in ("from_parts", "mount", "fold")):
        raise RequestError(
            f"a graft with {meta['type']!r}, which is no operation",
            expected="the class of an operation",
            do="upgrade neurograft, or ask whoever made the graft",
        )
    prefix = f"operation.{i}::"
    return made.from_parts(meta, {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})


def push(graft: Graft, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
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
    except (ValueError, OSError) as error:
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


def _pack(graft: Graft) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    logs: list[Log] = []
    for name, delta in graft.deltas.items():
        entry: dict[str, Any] = {"shape": list(delta.shape), "kind": type(delta).__name__.lower()}
        if isinstance(delta, Shut):
            entry |= {"matrix": list(delta.region.matrix)}
            key, packed = shortest(delta.region)
            tensors[f"{name}::{key}"] = packed
        elif isinstance(delta, (Slice, Replay)):
            region = delta.region
            entry |= {"layout": region.layout, "matrix": list(region.matrix), "block": region.block}
            if region.layout != "all":
                tensors[f"{name}::{region.layout}"] = narrow_ids(region.ids, gaps=region.layout == "flat")
            if isinstance(delta, Slice):
                tensors[f"{name}::value"] = delta.values.detach().cpu().contiguous()
            else:
                entry |= _logged(delta, logs)
        elif isinstance(delta, LowRank):
            entry |= {"scale": delta.scale, "transposed": delta.transposed}
            tensors[f"{name}::lora_A"] = delta.A.detach().cpu().contiguous()
            tensors[f"{name}::lora_B"] = delta.B.detach().cpu().contiguous()
        else:
            entry |= {"after": delta.after}
            tensors[f"{name}::added"] = delta.values.detach().cpu().contiguous()
        entries[name] = entry
    for i, log in enumerate(logs):
        tensors |= {f"log.{i}::{key}": getattr(log, key).contiguous() for key in Log.NAMES}
    for i, operation in enumerate(graft.operations):
        for key, tensor in operation.tensors().items():
            tensors[f"operation.{i}::{key}"] = tensor.detach().cpu().contiguous()
    text = {
        "format": FORMAT,
        "identity": graft.identity,
        "strength": graft.strength,
        "tensors": entries,
        "base": dict(graft.base),
        "operations": [o.meta() for o in graft.operations],
        "card": dict(graft.card),
    }
    if logs:
        text["logs"] = [{"grain": log.grain, "made": log.made} for log in logs]
    return tensors, text


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


def _logged(delta: Replay, logs: list[Log]) -> dict[str, Any]:
    """Return what a file says of a replayed change; its log joins those of the others if it is not among them."""
    if not any(log is delta.log for log in logs):
        logs.append(delta.log)
    number = next(i for i, log in enumerate(logs) if log is delta.log)
    held = str(delta.held).removeprefix("torch.")
    return {"log": number, "track": delta.track, "stream": delta.stream, "held": held, "result": delta.result}


def _log(i: int, made: dict[str, Any], tensors: dict[str, Tensor]) -> Log:
    seeds, pulls, rates, keeps = (tensors[f"log.{i}::{key}"] for key in Log.NAMES)
    return Log(seeds, pulls, rates, keeps, made["grain"], made["made"])


def _unpack(name: str, entry: dict[str, Any], tensors: dict[str, Tensor], logs: list[Log]) -> Delta:
    shape = tuple(entry["shape"])
    if entry["kind"] == "lowrank":
        A, B = tensors[f"{name}::lora_A"], tensors[f"{name}::lora_B"]
        (rank, into), (out, same) = A.shape, B.shape
        if rank != same or math.prod(shape) != out * into:
            raise KeyError(f"factors of a tensor of shape {shape} for {name}")
        return LowRank(shape, A, B, entry["scale"], entry["transposed"])
    if entry["kind"] == "new":
        return New(tensors[f"{name}::added"], entry["after"])
    if entry["kind"] == "shut":
        return _shut(name, shape, tuple(entry["matrix"]), tensors)
    layout = entry["layout"]
    ids: Iterable[int] | Tensor = ()
    if layout != "all":
        ids = wide_ids(tensors[f"{name}::{layout}"], gaps=layout == "flat")
    block = tuple(entry["block"]) if entry["block"] else None
    region = Region.of(shape, layout, ids, matrix=tuple(entry["matrix"]), block=block)
    if entry["kind"] == "replay":
        held = getattr(torch, entry["held"])
        return Replay(region, entry["stream"], held, logs[entry["log"]], entry["track"], entry["result"])
    values = tensors[f"{name}::value"]
    if tuple(values.shape) != region.values_shape:
        raise KeyError(f"values of shape {region.values_shape} for {name}")
    return Slice(region, values)


def _shut(name: str, shape: tuple[int, ...], matrix: tuple[int, int, int], tensors: dict[str, Tensor]) -> Shut:
    bits = tensors.get(f"{name}::bits")
    if bits is None:
        return Shut(Region.of(shape, "flat", wide_ids(tensors[f"{name}::flat"], gaps=True), matrix=matrix))
    if len(bits) != -(-math.prod(shape) // 8):
        raise KeyError(f"a bit for each of the {math.prod(shape)} entries of {name}")
    return Shut(Region.of(shape, "flat", unpacked_bits(bits).nonzero().reshape(-1), matrix=matrix))


def shortest(region: Region) -> tuple[str, Tensor]:
    """Return a set of entries as "bits", one for each entry of the tensor, or as "flat" distances if that is shorter.

    Example:
        >>> shortest(Region.of((4, 4), "flat", [0, 3, 8]))[1].tolist(), shortest(Region.of((99, 99), "flat", [7]))[0]
        ([9, 1], 'flat')
    """
    entries = region.flat().cpu().sort().values
    ids = narrow_ids(entries, gaps=True)
    total = math.prod(region.shape)
    if ids.numel() * ids.element_size() < -(-total // 8):
        return "flat", ids
    mask = torch.zeros(total, dtype=torch.bool)
    mask[entries] = True
    return "bits", packed_bits(mask)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors wants them: what two names hold is copied for the second."""
    seen: set[int] = set()
    made = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return made


def packed_bits(mask: Tensor) -> Tensor:
    """Return bool [n] as uint8 [ceil(n / 8)], the first entry in the lowest bit."""
    padded = torch.zeros(-(-len(mask) // 8) * 8, dtype=torch.uint8)
    padded[: len(mask)] = mask
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked_bits(bits: Tensor) -> Tensor:
    """Read what `packed_bits` wrote, bool [8 k], unused bits False."""
    return ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().reshape(-1)


def narrow_ids(ids: Tensor, *, gaps: bool) -> Tensor:
    """Return sorted ids in the narrowest unsigned type, as distances from the one before if `gaps`.

    Example:
        >>> narrow_ids(torch.tensor([3, 70000, 70001]), gaps=True).tolist()
        [3, 69997, 1]
    """
    coded = torch.cat([ids[:1], ids.diff()]) if gaps else ids
    top = int(coded.max()) if len(coded) else 0
    dtype = torch.uint8 if top < 1 << 8 else torch.uint16 if top < 1 << 16 else torch.uint32
    return coded.to("cpu", dtype if top < 1 << 32 else torch.int64)


def wide_ids(coded: Tensor, *, gaps: bool) -> Tensor:
    """Read what `narrow_ids` wrote."""
    ids = coded.to(torch.int64)
    return ids.cumsum(0) if gaps else ids
