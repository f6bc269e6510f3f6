"""The tensors of a model, live or in files, one at a time and under the names of the base's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.grafts.coordinates import Coordinates, coordinates
from neurograft.core.grafts.origin import describe
from neurograft.core.grafts.stack import Stack
from neurograft.core.resolve import resolve
from neurograft.pipeline._configs import SHIPPED, class_of, config_of
from neurograft.pipeline.models import Model, load_model

INDEX = ".safetensors.index.json"
Reader = Callable[[], Tensor]


@dataclass
class Source:
    """Readers of a model's tensors.

    Args:
        known: tensor of the base's checkpoint -> its readers; two if both names of a tied one are there.
        unknown: tensors that the base's checkpoint lacks.
    """

    known: dict[str, list[Reader]] = field(default_factory=dict)
    unknown: dict[str, Reader] = field(default_factory=dict)

    def put(self, name: str, where: Coordinates, read: Reader) -> None:
        """Enter a tensor under the base's name for it."""
        try:
            self.known.setdefault(where.resolve(name), []).append(read)
        except RequestError:
            self.unknown[name] = read


def live(model: nn.Module, where: Coordinates, *, below: bool) -> Source:
    """Return the tensors of a live model: as it stands, or as it is below the grafts on it."""
    found, mine, stack = Source(), coordinates(model), Stack.of(model)
    for name in mine.names():
        found.put(name, where, lambda name=name: stack.base(name, model, mine) if below else mine.read(name))  # type: ignore[misc]
    return found


def files(folder: Path, where: Coordinates, keep: ExitStack) -> Source:
    """Return the tensors of a folder's safetensors files, read when they are asked for.

    Raises:
        RequestError: the folder has no safetensors weights, or one is truncated.
    """
    found = Source()
    for path in weight_files(folder):
        try:
            file = keep.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise RequestError(
                f"{path}, truncated or damaged ({error})",
                expected="a safetensors file",
                do="copy or download it again",
            ) from error
        for name in file.keys():  # noqa: SIM118
            found.put(name, where, lambda file=file, name=name: file.get_tensor(name))  # type: ignore[misc]
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return a model folder's safetensors files, each once, those its index names if it has one.

    Raises:
        RequestError: there are none; pickled weights are never read.
    """
    index = next(iter(sorted(folder.glob("*" + INDEX))), None)
    if index is not None:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [folder / Path(name).name for name in names]
    else:
        paths = [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith(("adapter_", "graft."))]
    lost = [p for p in paths if not p.is_file()]
    if lost or not paths:
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        came = f"{lost[0]}, which is missing" if lost else f"the folder {folder} without safetensors weights"
        raise RequestError(
            came + (f" ({pickled[0]} is a pickle, which is never read)" if pickled else ""),
            expected="model.safetensors, or an index and its shards",
            do="save the model with save_pretrained, or complete the download",
        )
    return paths


def located(model: Model, revision: str | None) -> Path | None:
    """Return the local folder of a model given by path or Hub id; None for a live one.

    Raises:
        RequestError: nothing is there.
    """
    if isinstance(model, nn.Module):
        return None
    name = str(model)
    if name in SHIPPED and not Path(name).exists():
        return Path(resolve(SHIPPED[name])())
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        config_of(name, {})  # raises with the near matches
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise RequestError(
            f"the model {name!r}, neither a folder nor a reachable Hub model",
            expected="a model folder or a Hub id",
            do="check the name and the connection",
        ) from error


def shell(folder: Path, name: str, revision: str | None) -> nn.Module:
    """Return the model of a folder without its numbers, or with them where its class cannot be built empty."""
    config: Any = config_of(str(folder), {})
    if isinstance(config, dict):
        return load_model(str(folder))
    with torch.device("meta"):
        made: nn.Module = class_of(config, str(folder), None)(config)
    made.config.name_or_path = name  # type: ignore[union-attr, assignment]
    if revision is not None:
        made.config._commit_hash = revision  # type: ignore[union-attr, assignment]
    return made.eval()


def described(model: nn.Module, source: Source) -> dict[str, Any]:
    """Return what a card says of a base whose numbers are in `source`."""
    found = describe(model)
    for readers in source.known.values():
        first = readers[0]()
        if first.is_floating_point():
            found["dtype"] = str(first.dtype).removeprefix("torch.")
            break
    return found
