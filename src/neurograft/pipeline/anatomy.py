"""`anatomy`: which units a model has, where they are, and whether that is true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from neurograft.anatomy._reading import Reading
from neurograft.anatomy.sites import every_kind, read
from neurograft.anatomy.verify import Row, check
from neurograft.core.errors import RequestError
from neurograft.core.units import Site, census
from neurograft.pipeline.models import Model, load_model
from neurograft.worlds.pico import families, pico, pico_batch, strangers


def anatomy(
    model: Model | None = None,
    *,
    all: bool = False,
    verify: bool = False,
    limit: int = 2,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    seed: int = 0,
) -> dict[str, Any]:
    """List the units of a model by kind; with `all`, verify tiny models of every architecture that is known.

    Args:
        model: a module, a folder, a Hub id or a shipped model; none with `all`.
        all: verify every family that has a file, and a choice of architectures that have none.
        verify: silence units of the model in their weights and at their taps, on made-up inputs, and compare.
        limit: sites of a kind that are verified.
        revision: of a Hub id.
        dtype: of the weights; verification is strictest in float64.
        device_map: as for `from_pretrained`.
        seed: names the units that are silenced and the made-up inputs.

    Returns:
        Plain data. Of a model: family, layers, embedding, head, what was not recognized and why, and `kinds`: for
        each kind and activation its sites, units, numbers owned, and an example. With `all`: how many passed, and
        for each architecture whether, and why not.

    Raises:
        RequestError: neither a model nor `all`, or both; an unknown model.

    Example:
        >>> found = anatomy(pico("gpt2"))
        >>> [(row["kind"], row["units"], row["example"]) for row in found["kinds"] if row["kind"] == "head"][0]
        ('head', 8, 'transformer.h.0.attn/head')
    """
    if (model is None) != all:
        raise RequestError(
            "a model and all=True" if all else "no model",
            expected="a model, or all=True",
            do="neurograft anatomy MODEL, or neurograft anatomy --all",
        )
    if model is None:
        return everything(limit=limit, seed=seed)
    live = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    reading = read(live)
    rows = check(reading, pico_batch(live, seed=seed), limit=limit, seed=seed) if verify else []
    known = reading.anatomy
    return {
        "family": known.family,
        "parameters": sum(p.numel() for p in reading.inventory.parameters.by_name.values()),
        "layers": len(known.layers),
        "first_layer": known.layers[0] if known.layers else None,
        "embedding": known.embedding,
        "head": known.head,
        **({"not_recognized": known.note} if known.note else {}),
        "kinds": [_kind(found, reading, rows) for found in every_kind(reading)],
    }


def _kind(found: Mapping[str, Site], reading: Reading, rows: list[Row]) -> dict[str, Any]:
    first = next(iter(found.values()))
    checked = [row for row in rows if row.site in found]
    tap = "none" if first.tap is None else "silenced by its weights" if first.writes else "reading only"
    return {
        "kind": first.kind,
        "at": first.at if len({s.at for s in found.values()}) == 1 else "",
        "sites": len(found),
        "units": sum(s.n for s in found.values()),
        "numbers": census(found),
        "tap": tap,
        "example": first.name,
        **({"verified": ", ".join(f"{n} {s}" for s, n in Counter(r.status for r in checked).items())} if rows else {}),
        **({"reason": "; ".join(dict.fromkeys(r.reason for r in checked if r.reason))} if rows else {}),
    }


def everything(*, limit: int = 2, seed: int = 0) -> dict[str, Any]:
    """Verify tiny models of all families and of the strangers; see `anatomy`."""
    rows = [_architecture(name, "family file", limit, seed) for name in families()]
    rows += [_architecture(name, "dataflow", limit, seed) for name in strangers()]
    passed = Counter(row["by"] for row in rows if row["passes"])
    total = Counter(row["by"] for row in rows)
    return {f"{by}: pass": f"{passed[by]} of {n}" for by, n in total.items()} | {"architectures": rows}


def _architecture(name: str, by: str, limit: int, seed: int) -> dict[str, Any]:
    model: nn.Module = pico(name, seed=seed, dtype=torch.float64)
    reading = read(model)
    known = reading.anatomy
    rows = check(reading, pico_batch(model, seed=seed), limit=limit, seed=seed)
    reasons = [f"{row.site}: {row.reason}" for row in rows if row.status == "failed"]
    found = {"heads": any(b.attentions for b in known.blocks), "neurons": any(b.ffns for b in known.blocks)}
    if known.note and not all(found.values()):
        reasons.append(known.note)
    count = Counter(row.status for row in rows)
    return {
        "architecture": name,
        "model": type(model).__name__,
        "by": by,
        "passes": not reasons,
        "kinds": len({row.kind for row in rows}),
        "equal": count["equal"],
        "largest_error": max(
            (row.error for row in rows if row.error is not None and row.status == "equal"), default=None
        ),
        "reason": "; ".join(reasons),
    }
