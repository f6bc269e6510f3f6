"""Files of scores and of selections: one safetensors file, with its units and its card beside the tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.grafts.store import apart
from neurograft.core.units import Site


def save(
    path: Path, kind: str, sites: Mapping[str, Site], tensors: Mapping[str, Tensor], card: Mapping[str, Any]
) -> Path:
    """Write a file whole, or not at all.

    Args:
        path: where; an older file there is replaced.
        kind: "scores" or "selection".
        sites: site name -> site.
        tensors: site name -> its scores or unit numbers.
        card: plain data.
    """
    # One key only: safetensors writes its metadata in random order, and the same seed gives the same bytes.
    meta = {
        "neurograft": json.dumps({"kind": kind, "sites": [s.as_dict() for s in sites.values()], "card": dict(card)})
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")  # written whole, then put in its place
    try:
        work.touch()
        mode = work.stat().st_mode
        save_file(apart({n: t.contiguous() for n, t in tensors.items()}), work, metadata=meta)
        work.chmod(mode)  # safetensors writes for its owner alone
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)
    return path


def load(path: Path, kind: str) -> tuple[dict[str, Site], dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: sites, tensors and card.

    Raises:
        RequestError: no file, one of another kind, or a spoiled one.
    """
    if not path.is_file():
        raise RequestError(f"the path {path}, where no file is", expected=f"a {kind} file", do="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("neurograft", "{}"))
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise RequestError(
            f"{path}, which is no safetensors file ({error})", expected=f"a {kind} file", do="write it again"
        ) from error
    if meta.get("kind") != kind:
        raise RequestError(
            f"{path}, a {meta.get('kind') or 'foreign'} file",
            expected=f"a {kind} file",
            do="take units by their scores first: `neurograft select FILE`, or scores.top(fraction=0.01)"
            if (meta.get("kind"), kind) == ("scores", "selection")
            else f"give a file written by {kind}.save",
        )
    try:
        sites = [Site.from_dict(s) for s in meta["sites"]]
        return {s.name: s for s in sites}, tensors, meta["card"]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{path}, whose description of the units is spoiled ({error})",
            expected=f"a {kind} file",
            do="write it again",
        ) from error
