"""`apply`: a base and grafts as one full checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.stack import Stack
from neurograft.export._readme import readme
from neurograft.export.merged import check_shard, folded, write
from neurograft.pipeline._sources import located
from neurograft.pipeline.models import Model, load_model


def apply(
    base: Model,
    grafts: Sequence[Graft | str | Path],
    output: str | Path | None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    shard: str = "5GB",
) -> Path:
    """Write the base with all grafts on as a full checkpoint; their order does not matter.

    Every graft is verified against the base, the files are read back and compared with the model bit for bit,
    and the base is left as it was.

    Args:
        base: the base: live, path or Hub id.
        grafts: grafts, or their folders or Hub ids.
        output: a new or empty folder.
        revision: of the base, if it is a Hub id.
        dtype: to load the base in; as saved if None.
        device_map: as for `from_pretrained`.
        shard: size of a file.

    Returns:
        The folder.

    Raises:
        RequestError: no graft, a folder in use, another base, or grafts that cannot be put on together.
        RunError: what was written is not what the model holds.
    """
    if output is None:
        raise RequestError("no folder to write to", expected="an output folder", do="give -o DIR")
    check_shard(shard)
    if not grafts:
        raise RequestError("no graft to apply", expected="at least one", do="name the folders of the grafts")
    target, folder = Path(output), located(base, revision)
    sources = [folder, *(Path(str(g)) for g in grafts if not isinstance(g, Graft))]
    inside = [s for s in sources if s is not None and s.exists() and target.resolve().is_relative_to(s.resolve())]
    if inside:
        raise RequestError(
            f"the output {target}, which lies in the input {inside[0]}",
            expected="another folder",
            do="choose a folder outside of what is read",
        )
    read = [g if isinstance(g, Graft) else Graft.load(g) for g in grafts]
    model = load_model(base, revision=revision, dtype=dtype, device_map=device_map)
    if Stack.of(model).grafts:
        raise RequestError("a base with grafts on", expected="a plain base", do="remove them, or name them too")
    source = "" if folder is None else str(folder)
    named = {"Grafts": "\n".join(f"- `{g.identity[:16]}` at strength {g.strength:g}" for g in read)}
    with folded(read, model):
        text = readme(read[0], str(base) if folder is not None else "", "merged", named)
        return write(model, target, source=source, shard=shard, verify=True, text=text)
