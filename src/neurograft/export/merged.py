"""A graft written into its base: a full checkpoint that any loader reads, bit-equal to the grafted model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError, RunError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.coordinates import coordinates, holders
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.operation import Operation
from neurograft.core.grafts.stack import ATTRIBUTE, Stack
from neurograft.core.region import Region
from neurograft.core.untie import Untie
from neurograft.export._changes import base_model, base_name, place
from neurograft.export._readme import readme

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@method(claims={"coordinates"})
def merged(
    graft: Graft,
    folder: Path,
    *,
    model: nn.Module | None = None,
    shard: str = "5GB",
    verify: bool = True,
) -> Path:
    """Write the base with the graft on as a full checkpoint, in shards, through `save_pretrained`.

    Operations are folded into weights where that is exact. The model is left as it was found.

    Args:
        graft: the graft.
        folder: a new or empty folder.
        model: the base; without it the base named on the card is loaded.
        shard: size of a file, as `save_pretrained` takes it.
        verify: read the files back and compare every tensor bit for bit.

    Returns:
        The folder, with the checkpoint, its config, the tokenizer's files if the base is a local folder, and a README.

    Raises:
        RequestError: another base, other grafts on it, or an operation that is not exactly a change of weights.
        RunError: what was written is not what the model holds.
    """
    model = base_model(graft, model)
    worn = Stack.of(model).grafts.get(graft.identity)
    others = Stack.of(model).grafts.keys() - {graft.identity}
    if others:
        raise RequestError(
            f"a merged export from a model with {len(others)} other grafts on",
            expected="the base, with nothing or this graft on",
            do="remove them, or merge them all with `neurograft apply`",
        )
    if not hasattr(model, "save_pretrained"):
        raise RequestError(
            f"a {type(model).__name__}, which has no save_pretrained",
            expected="a transformers or diffusers model",
            do="apply the graft and save the state_dict",
        )
    check_shard(shard)
    source = base_name(graft, model, None)[0]
    with ExitStack() as undo:
        if worn is not None:  # at another strength perhaps, and its operations are no weights yet
            Stack.of(model).drop(model, worn)
            undo.callback(lambda: Stack.of(model).add(model, worn))
        undo.enter_context(folded([graft], model))
        return write(model, folder, source=source, shard=shard, verify=verify, text=readme(graft, source, "merged", {}))


def check_shard(shard: str) -> None:
    """Raise unless this is the size of a file.

    Raises:
        RequestError: as said.

    Example:
        >>> check_shard("200MB")
    """
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", str(shard).upper()) or not float(shard[:-2]):
        raise RequestError(f"shard={shard!r}", expected="a size such as 5GB or 200MB", do="leave it out")


def write(model: nn.Module, folder: Path, *, source: str, shard: str, verify: bool, text: str) -> Path:
    """Write a model as it stands into a new folder, atomically, and read it back.

    Args:
        model: the model.
        folder: a new or empty folder.
        source: folder of the base, whose tokenizer and other small files are taken along if it is a local one.
        shard: size of a file.
        verify: compare what was written.
        text: the README.
    """
    fresh, folder = not folder.exists(), place(folder)
    work = folder / ".writing"
    try:
        model.save_pretrained(work, max_shard_size=shard)  # type: ignore[operator]
        if verify:
            _compare(model, work)
        (work / "README.md").write_text(text)
        origin = Path(source)
        if source and origin.is_dir() and origin.resolve() != folder.resolve():
            for path in origin.iterdir():
                index = path.name.endswith(".index.json")
                if path.is_file() and not path.name.endswith(WEIGHTS) and not index and not (work / path.name).exists():
                    shutil.copy(path, work / path.name)
        for path in work.iterdir():
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if fresh and not any(folder.iterdir()):
            folder.rmdir()
    return folder


def _compare(model: nn.Module, folder: Path) -> None:
    where, left = coordinates(model), set(coordinates(model).names())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in left or not same_bits(file.get_tensor(name), where.read(name)):
                    raise RunError(f"{path.name} does not hold the tensor {name} as the model does; nothing was kept")
                left.discard(name)
    if left:
        raise RunError(f"the written checkpoint lacks {sorted(left)[0]} and {len(left) - 1} others; nothing was kept")


@contextmanager
def folded(grafts: Sequence[Graft], model: nn.Module) -> Iterator[None]:
    """Put grafts on, their operations folded into the weights they then have, and take all of it off again.

    Raises:
        RequestError: a graft does not fit, or an operation is not exactly a change of weights.
    """
    written: list[tuple[Tensor, Region, Tensor]] = []
    with ExitStack() as undo:
        for graft in grafts:
            ties = tuple(o for o in graft.operations if isinstance(o, Untie))
            undo.enter_context((replace(graft, operations=ties) if ties != graft.operations else graft).on(model))
        try:
            for graft in grafts:
                for operation in graft.operations:
                    if isinstance(operation, Untie):
                        continue
                    for name, change in _now(operation.scaled(graft.strength), model).items():
                        weight = holders(model)[name]
                        written.append((weight, change.region, change.region.read(weight)))
                        change.region.write_(weight, change.values)
            yield
        finally:
            for weight, region, before in reversed(written):
                region.write_(weight, before)


def _now(operation: Operation, model: nn.Module) -> dict[str, Slice]:
    """Fold an operation into the weights as they are now, as if the grafted numbers were a base's."""
    stack = model.__dict__.pop(ATTRIBUTE, None)
    try:
        return operation.fold(model)
    finally:
        if stack is not None:
            model.__dict__[ATTRIBUTE] = stack
