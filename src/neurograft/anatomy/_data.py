"""Reading the family files: one small YAML file per architecture family, roles -> module paths.

    blocks:                    # class name of a repeated block
      LlamaDecoderLayer:
        attention:             # entries; one applies where all of its modules exist
          - {module: self_attn, q: q_proj, k: k_proj, v: v_proj, o: o_proj, width: head_dim}
        ffn:
          - {module: mlp, gate: gate_proj, up: up_proj, down: down_proj}

Paths of an entry are relative to its `module`, that one to the block ("" is the block itself).
attention   q k v o, or a fused `qkv` with `layout: stacked` (all q, all k, all v) or `grouped` (for each
            key/value head: its q heads, k, v); `also`: more projections cut like q; `width`: attribute that
            holds the features of a head; `role`: "attention" unless given.
ffn         up and down, plus gate if it is gated; a fused `gate_up` (gate first); or experts: a fused bank
            `bank`, a list of modules `experts` with gate/up/down relative to each, `router`, `shared`.
            A bank stored interleaved or transposed says so itself.
mix         other sub-layers: {role: {module: where the contribution passes, writes: [modules]}}.
Outside blocks: `extra` (class name -> the same entries, for modules that are no layer), `channels` (class
name -> {conv, norm}: a convolution whose feature maps leave through a norm), `one_plus` (norm classes that
multiply by 1 + weight), `model_types` (names the family goes by), `like` (a file whose entries these are).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class Family:
    """What one family file says."""

    name: str
    blocks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    channels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    one_plus: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()


@cache
def families() -> dict[str, Family]:
    """Return every family file by name.

    Example:
        >>> "llama" in families()
        True
    """
    folder = files("neurograft.anatomy").joinpath("families")
    raw = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return {name: _family(name, yaml.safe_load(raw[name].read_text(encoding="utf-8"))) for name in sorted(raw)}


def _family(name: str, data: dict[str, Any]) -> Family:
    shared = data.pop("entries", {})
    blocks = {cls: entry or shared for cls, entry in data.pop("blocks", {}).items()}
    one_plus, model_types = (tuple(data.pop(key, ())) for key in ("one_plus", "model_types"))
    return Family(name, blocks=blocks, one_plus=one_plus, model_types=model_types, **data)
