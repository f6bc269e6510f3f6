"""The anatomy of a model: its blocks, their sub-layers, its embedding, head and norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from neurograft.anatomy._blocks import Block, read_block
from neurograft.anatomy._data import Family, families
from neurograft.anatomy.matrix import Inventory


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are.

    Args:
        family: names of the families its blocks belong to, joined by "+"; "structural" for blocks found by
            shape and dataflow.
        layers: modules of its repeated blocks, in the order of the model.
        branches: for each layer, role -> the module whose output is that sub-layer's contribution before the
            residual and its norm.
        embedding: module of the token embedding, or None.
        head: module of the output head, or None.
        norms: modules of all norms.
        blocks: what is known of each block, and of modules of that kind outside of the layers.
        channels: convolutions whose feature maps leave through a norm: convolution -> norm.
        one_plus: norms that multiply by 1 + weight.
        note: why there are no blocks, if there are none.
    """

    family: str
    layers: list[str]
    branches: list[dict[str, str]]
    embedding: str | None
    head: str | None
    norms: list[str]
    blocks: tuple[Block, ...] = ()
    channels: Mapping[str, str] = field(default_factory=dict)
    one_plus: frozenset[str] = frozenset()
    note: str = ""


def anatomy(model: nn.Module) -> Anatomy:
    """Describe a model by its family's file.

    Args:
        model: a model of a known family, bare or with any head.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> anatomy(pico("llama")).branches[0]
        {'attention': 'model.layers.0.self_attn.o_proj', 'ffn': 'model.layers.0.mlp.down_proj'}
    """
    return describe(Inventory(model))


def describe(inventory: Inventory) -> Anatomy:
    """Describe a model whose modules have been read; see `anatomy`."""
    known = _by_class()
    blocks, channels, one_plus = [], {}, set()
    for name, module in inventory.modules.items():
        for cls in (c.__name__ for c in type(module).__mro__):
            if cls not in known:
                continue
            family, what = known[cls]
            if what == "one_plus":
                one_plus.add(name)
            elif what == "channels":
                pair = family.channels[cls]
                channels[f"{name}.{pair['conv']}"] = f"{name}.{pair['norm']}"
            else:
                repeated = what == "blocks"
                entries = (family.blocks if repeated else family.extra)[cls]
                found = read_block(inventory, name, entries, family.name, repeated=repeated)
                if found is None:
                    continue
                blocks.append(found)
            break
    layers = [b.name for b in blocks if b.repeated]
    return Anatomy(
        family=_family_name(inventory.model, blocks),
        layers=layers,
        branches=[{b.role: b.module for b in block.branches} for block in blocks if block.repeated],
        embedding=embedding_of(inventory),
        head=head_of(inventory),
        norms=[n for n, m in inventory.modules.items() if is_norm(m)],
        blocks=tuple(blocks),
        channels=channels,
        one_plus=frozenset(one_plus),
    )


@cache
def _by_class() -> dict[str, tuple[Family, str]]:
    found: dict[str, tuple[Family, str]] = {}
    for family in families().values():
        for what in ("blocks", "extra", "channels", "one_plus"):
            found.update(dict.fromkeys(getattr(family, what), (family, what)))
    return found


def _family_name(model: nn.Module, blocks: list[Block]) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family in families().values():
        if kind in family.model_types:
            return family.name
    return "+".join(dict.fromkeys(b.family for b in blocks)) or "structural"


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a normalization with a gain."""
    gain = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and gain is not None and gain.dim() == 1


def embedding_of(inventory: Inventory) -> str | None:
    """Return the module of the token embedding, if the model has one."""
    return _named(inventory, "get_input_embeddings", nn.Embedding)


def head_of(inventory: Inventory) -> str | None:
    """Return the module of the output head: the language model's, else the last linear layer outside of blocks."""
    found = _named(inventory, "get_output_embeddings", nn.Module)
    if found is not None:
        return found
    usual = ("classifier", "score", "qa_outputs", "lm_head", "proj_out", "head", "fc")
    for name in usual:
        inside = [n for n, m in inventory.modules.items() if n == name or n.startswith(f"{name}.")]
        linear = [n for n in inside if isinstance(inventory.modules[n], nn.Linear)]
        if linear:
            return linear[-1]
    return None


def _named(inventory: Inventory, method: str, wanted: type[nn.Module]) -> str | None:
    for module in inventory.modules.values():
        ask: Any = getattr(module, method, None)
        if ask is None:
            continue
        try:
            found = ask()
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(found, wanted):
            return next((n for n, m in inventory.modules.items() if m is found), None)
    return None
