"""A graft as a patch in checkpoint coordinates, the form in which vLLM's servers take weight updates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.grafts.combined import combined
from neurograft.core.grafts.coordinates import Piece, coordinates, everything
from neurograft.core.grafts.delta import Delta, LowRank, New, Shift, Slice
from neurograft.core.grafts.fits import named
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.replay import Replay
from neurograft.core.grafts.stack import Stack
from neurograft.core.region import as_matrix
from neurograft.export._changes import base_model, base_name, place
from neurograft.export._readme import readme

READING = """```python
import json
from safetensors import safe_open

with safe_open("patch.safetensors", "pt") as file:
    for entry in json.loads(file.metadata()["patches"]):
        indices = file.get_tensor(entry["name"] + "::indices") if entry["sparse"] else None
        CheckpointWeightPatch(entry["name"], tuple(entry["shape"]), getattr(torch, entry["dtype"]),
                              file.get_tensor(entry["name"] + "::values"), indices)
```"""


@method(claims={"coordinates"})
def patch(graft: Graft, folder: Path, *, model: nn.Module | None = None, undo: bool = True) -> Path:
    """Write the numbers a graft changes as replacements in checkpoint coordinates.

    `patch.safetensors` holds `<tensor>::values`, flat, in the base's dtype, and `<tensor>::indices`, flat int32
    (int64 from 2^31 entries on), sorted and contiguous; tensors that change everywhere have values only. Its
    metadata "patches" lists name, shape, dtype and whether there are indices: the fields of vLLM's
    CheckpointWeightPatch.

    Args:
        graft: the graft.
        folder: a new or empty folder.
        model: the base; without it the base named on the card is loaded.
        undo: write `undo.safetensors` too, which puts the base's numbers back.

    Raises:
        RequestError: another base, operations, appended rows, or NaN, which such patches use for "unchanged".
    """
    model = base_model(graft, model)
    odd = [o.describe() for o in graft.operations]
    odd += [f"rows appended to {n}" for n, d in graft.deltas.items() if isinstance(d, New) and d.after is not None]
    if odd:
        raise RequestError(
            f"a patch of a graft with {odd[0]}",
            expected="changes of numbers the base has",
            do="export to='merged'",
        )
    tensors, back, entries = _patches(graft, model)
    folder = place(folder)
    save_file(tensors, folder / "patch.safetensors", metadata={"format": "pt", "patches": json.dumps(entries)})
    if undo:
        save_file(back, folder / "undo.safetensors", metadata={"format": "pt", "patches": json.dumps(entries)})
    (folder / "README.md").write_text(readme(graft, base_name(graft, model, None)[0], "patch", {"Reading": READING}))
    return folder


def _patches(graft: Graft, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, object]]]:
    """Return the new numbers, the base's, and the list of patches."""
    stack, where = Stack.of(model), coordinates(model)
    now: dict[str, Tensor] = {}
    back: dict[str, Tensor] = {}
    entries: list[dict[str, object]] = []
    for tensor, delta in graft.deltas.items():
        name = named(tensor, graft, where)
        if not isinstance(delta, New):
            stack.check(tensor, graft, model, where)
        change = _change(name, delta)
        before = stack.numbers(name, change.region, model, where)
        after = combined(change.region, before, [(change, graft.strength)]).to(before.dtype)
        if bool(after.isnan().any()) or bool(before.isnan().any()):
            raise RequestError(f"NaN in a patch of {name}", expected="numbers", do="export to='merged'")
        now[f"{name}::values"], back[f"{name}::values"] = after.reshape(-1), before.reshape(-1)
        sparse = change.region.layout != "all"
        if sparse:
            indices, order = change.region.flat().cpu().sort()
            dtype = torch.int32 if math.prod(delta.shape) < 1 << 31 else torch.int64
            for made in (now, back):
                made[f"{name}::values"] = made[f"{name}::values"][order].contiguous()
                made[f"{name}::indices"] = indices.to(dtype)
        dtype_name = str(before.dtype).removeprefix("torch.")
        entries.append({"name": name, "shape": list(delta.shape), "dtype": dtype_name, "sparse": sparse})
    return now, back, entries


def _change(name: str, delta: Delta) -> Slice | Shift:
    if isinstance(delta, LowRank):
        return Shift(delta, Piece(name, everything(delta.shape, as_matrix(delta.shape))))
    assert not isinstance(delta, Replay)  # `Graft.export` has replayed it
    return delta.on() if isinstance(delta, New) else delta
