"""Reading the family files: one small YAML file per architecture family, roles -> module paths.

    blocks: [LlamaDecoderLayer]   # class names of repeated blocks
    entries:                      # one applies where all of its modules exist
      attention:
        - {module: self_attn, q: q_proj, k: k_proj, v: v_proj, o: o_proj, width: head_dim}
      ffn:
        - {module: mlp, gate: gate_proj, up: up_proj, down: down_proj}

Paths of an entry are relative to its `module`, that one to the block ("" is the block itself).
attention   q k v o, or a fused `qkv` with `layout: stacked` (all q, all k, all v) or `grouped` (for each
            key/value head: its q heads, k, v), or a fused `kv`; `also`: more projections cut like q;
            `width` or `heads`: the features of a head or the number of heads, or the attribute that holds
            them; `role`: "attention" unless given; `mixed`: whether a norm goes over all heads.
ffn         up and down, plus gate if it is gated; a fused `gate_up` (gate above up unless `order: up_gate`,
            one by one if `interleaved`); or experts: a fused bank `bank`, a list of modules `experts` with
            gate/up/down relative to each, `router`, `shared`. A bank stored interleaved or transposed says so
            itself.
mix         other sub-layers: {role: {module: where the contribution passes, writes: [modules]}}.
dim         feature axis of the block's output, -1 unless given.
any entry   `classes`: {module: class name}, `shape`: [out, in] of `o` or `down`: conditions for it to apply.
`blocks` may also map class names to entries of their own, `like` names a file whose entries these blocks have.
Beside them: `extra` (class name -> entries, for modules that are no layer), `channels` (class name -> {conv,
norm}: a convolution whose feature maps leave through a norm), `one_plus` (norm classes that multiply by
1 + weight), `model_types` (models that go by the file's name, whatever families their blocks have).
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
        >>> families()["mistral"].blocks == {"MistralDecoderLayer": families()["llama"].blocks["LlamaDecoderLayer"]}
        True
    """
    folder = files("neurograft.anatomy").joinpath("families")
    raw = {
        f.name.removesuffix(".yaml"): yaml.safe_load(f.read_text(encoding="utf-8"))
        for f in folder.iterdir()
        if f.name.endswith(".yaml")
    }
    return {name: _family(name, raw) for name in sorted(raw)}


def _family(name: str, raw: Mapping[str, Mapping[str, Any]]) -> Family:
    data = raw[name]
    entries = raw[data["like"]]["entries"] if "like" in data else data.get("entries", {})
    blocks = data.get("blocks", ())
    return Family(
        name,
        blocks=blocks if isinstance(blocks, Mapping) else dict.fromkeys(blocks, entries),
        extra=data.get("extra", {}),
        channels=data.get("channels", {}),
        one_plus=tuple(data.get("one_plus", ())),
        model_types=tuple(data.get("model_types", ())),
    )
