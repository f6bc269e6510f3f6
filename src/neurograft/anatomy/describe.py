"""The anatomy of a model: its blocks, their sub-layers, its embedding, head and norms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from neurograft.anatomy._blocks import read_block
from neurograft.anatomy._data import Family, families
from neurograft.anatomy._names import numbered, pattern
from neurograft.anatomy._types import Anatomy, Block
from neurograft.anatomy.inventory import Inventory
from neurograft.anatomy.structural import structural
from neurograft.core.errors import RequestError


def anatomy(model: nn.Module, *, batch: Mapping[str, Any] | None = None) -> Anatomy:
    """Describe a model by its family's file, or an unknown one by what its dataflow shows.

    Args:
        model: a model of a known family, bare or with any head; or any other that runs.
        batch: a small batch for a model of an unknown family; made up from its signature if None.

    Raises:
        RequestError: an unknown family that does not run on the given batch.

    Example:
        >>> from neurograft.worlds.pico import pico
        >>> anatomy(pico("llama")).branches[0]
        {'attention': 'model.layers.0.self_attn.o_proj', 'ffn': 'model.layers.0.mlp.down_proj'}
    """
    return describe(Inventory(model), batch=batch)


def describe(inventory: Inventory, *, batch: Mapping[str, Any] | None = None) -> Anatomy:
    """Describe a model whose modules have been read; see `anatomy`."""
    blocks, channels, one_plus = _by_file(inventory)
    note = "; ".join([*_undescribed(inventory, blocks), *_left_over(inventory, blocks)])
    if not any(block.repeated for block in blocks):
        try:
            found = structural(inventory, batch)
            blocks, note = blocks + found.blocks, "; ".join(found.notes)
            one_plus |= {n for n, m in inventory.modules.items() if is_norm(m) and is_one_plus(m)}
        except RequestError as refusal:
            if batch is not None:
                raise
            note = str(refusal)  # its matrices are known all the same; only units of blocks are not
    return Anatomy(
        family=_family_name(inventory.model, blocks),
        layers=[b.name for b in blocks if b.repeated],
        branches=[{b.role: b.module for b in block.branches} for block in blocks if block.repeated],
        embedding=embedding_of(inventory),
        head=head_of(inventory),
        norms=[n for n, m in inventory.modules.items() if is_norm(m)],
        blocks=tuple(blocks),
        channels=channels,
        one_plus=frozenset(one_plus),
        note=note,
    )


def _by_file(inventory: Inventory) -> tuple[list[Block], dict[str, str], set[str]]:
    """Return the blocks, the convolutions with their norms, and the norms by 1 + weight, that the files know."""
    known = _by_class()
    blocks: list[Block] = []
    channels: dict[str, str] = {}
    one_plus: set[str] = set()
    for name, module in inventory.modules.items():
        cls = next((c.__name__ for c in type(module).__mro__ if c.__name__ in known), None)
        if cls is None:
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
            block = read_block(inventory, name, entries, family.name, repeated=repeated)
            blocks.extend([block] if block is not None else [])
    return blocks, channels, one_plus


def _undescribed(inventory: Inventory, blocks: list[Block]) -> list[str]:
    """Name the repeated modules with linear layers that lie beside the known blocks, as of a foreign image tower."""
    known = {block.name for block in blocks}
    above = {name[:i] for name in known for i, letter in enumerate(name) if letter == "."}
    left: dict[str, str] = {}
    for name, module in inventory.modules.items():
        steps = name.split(".")
        inside = any(".".join(steps[:i]) in known for i in range(1, len(steps) + 1))
        if inside or name in above or not numbered(inventory, name):
            continue
        if sum(isinstance(m, nn.Linear) for m in module.modules()) > 1:
            left.setdefault(pattern(inventory, name), type(module).__name__)
    return [f"{where}: no family file knows {cls}" for where, cls in left.items()]


def _left_over(inventory: Inventory, blocks: list[Block]) -> list[str]:
    """Name the parts of known blocks that no entry speaks of, as an FFN whose modules were renamed.

    A single linear layer that is left may steer a block (a condition, a router); two in one module are a sub-layer.
    """
    used = {s.module for b in blocks for a in b.attentions for s in (*a.made.values(), a.o)}
    used |= {s.module for b in blocks for f in b.ffns for s in (f.gate, f.up, f.down) if s is not None}
    used |= {w for b in blocks for branch in b.branches for w in branch.writers}
    known = {block.name for block in blocks if block.repeated}
    left: dict[str, set[str]] = {}
    for name, module in inventory.modules.items():
        steps = name.split(".")
        above = {".".join(steps[:i]) for i in range(1, len(steps) + 1)}
        if isinstance(module, nn.Linear) and above & known and not above & used:
            left.setdefault(pattern(inventory, name.rpartition(".")[0]), set()).add(steps[-1])
    several = [where for where, names in left.items() if len(names) > 1]
    return [f"{where}: the family's file does not know its linear layers" for where in several]


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


def is_one_plus(module: nn.Module) -> bool:
    """Say whether a norm of an unknown class multiplies by 1 + weight: whether it passes something with weight 0."""
    if type(module).__module__.startswith("torch.nn"):
        return False
    probe = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        width = probe.weight.shape[0]  # type: ignore[union-attr,index]
        x = torch.arange(2.0 * width).sin().view(1, 2, width).to(probe.weight)  # type: ignore[arg-type]
        try:
            return bool(probe(x).any())
        except (RuntimeError, TypeError, ValueError):
            return True  # it takes something else; then its weights are not claimed to silence it


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
