"""The anatomy of an unknown architecture, from shapes and dataflow; nothing is believed that is not verified.

A tiny forward pass tells the order of the linear layers; moving single output features of one and watching the
input of a later one tells what lies between them:
  FFN         a feature of `up` reaches exactly one input feature of `down`, of the same token, and not linearly;
              of two such layers, or halves of one, the one that acts linearly is `up`, the other `gate`;
  attention   a query feature reaches the inputs of `o` that belong to one head, at its own token only; a key
              feature the same at other tokens too (of all heads that share it); a value feature the one place of
              it in each of those heads.
So head width, sharing and the layout of fused projections are measured, not guessed. What is found is written as
the entries of a family file and read like one; then silencing units in their weights must equal silencing them at
the tap. Fused banks of experts are known by transformers' own convention (`down_proj` [E, ...] and its marks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from neurograft.anatomy._block_units import heads, neurons
from neurograft.anatomy._blocks import join, read_block
from neurograft.anatomy._find import Entry
from neurograft.anatomy._names import pattern
from neurograft.anatomy._probe import Probe
from neurograft.anatomy._reading import Reading
from neurograft.anatomy._search import Search
from neurograft.anatomy._silence import ROUNDING, both_ways, distance, outputs, quiet, some_units
from neurograft.anatomy._types import Anatomy, Block
from neurograft.anatomy.inventory import Inventory
from neurograft.core.errors import RequestError, RunError
from neurograft.core.resolve import resolve
from neurograft.core.units import Site


@dataclass
class Structure:
    """What was found.

    Args:
        entries: pattern of a block's name ("#" for its number) -> entries as in a family file.
        blocks: every block, described.
        notes: what was not understood, and why.
    """

    entries: dict[str, dict[str, list[Entry]]] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def structural(inventory: Inventory, batch: Mapping[str, Any] | None = None) -> Structure:
    """Find the blocks of a model of unknown architecture.

    Args:
        inventory: its modules.
        batch: a small batch of inputs with at least two tokens a row; made up from the model's signature if None.

    Raises:
        RequestError: no batch was given and none could be made, or the model does not run on it twice alike.
    """
    with quiet(inventory.model):
        probe = _probe(inventory, batch)
        search = Search(probe)
        found = Structure(search.entries())
        found.blocks = _blocks(inventory, found.entries)
        failures = _refuted(inventory, found, probe.batch)
        if failures:
            found.blocks = _blocks(inventory, found.entries)
        found.notes = failures + search.unknown(found.blocks)
    return found


def _blocks(inventory: Inventory, entries: Mapping[str, Mapping[str, list[Entry]]]) -> list[Block]:
    mine = {name: entries.get(pattern(inventory, name)) for name in inventory.modules if name}
    read = (read_block(inventory, name, e, "structural") for name, e in mine.items() if e)
    return [block for block in read if block is not None]


def _refuted(inventory: Inventory, found: Structure, batch: Mapping[str, Any]) -> list[str]:
    """Silence units of the first block of each pattern in both ways; drop the entries that fail, and say which."""
    notes, seen = [], set()
    whole = Reading(inventory, Anatomy("structural", [], [], None, None, [], tuple(found.blocks)))
    for block in found.blocks:
        key = pattern(inventory, block.name)
        if key in seen:
            continue
        seen.add(key)
        one = replace(whole, anatomy=replace(whole.anatomy, blocks=(block,)))
        for kind, sites in (("attention", heads(one)), ("ffn", neurons(one))):
            for site in sites:
                why = _silencing(inventory.model, batch, site)
                if why:
                    module = site.name.rpartition("/")[0]
                    notes.append(f"{module}: {why}")
                    entries = found.entries[key][kind]
                    entries[:] = [e for e in entries if not _about(e, block.name, module)]
    return notes


def _about(entry: Entry, block: str, module: str) -> bool:
    """Say whether an entry describes a module: itself, or the experts it is one of."""
    whole = join(block, entry["module"], str(entry.get("bank") or entry.get("experts") or ""))
    return module == whole or (("bank" in entry or "experts" in entry) and module.rpartition(".")[0] == whole)


def _silencing(model: nn.Module, batch: Mapping[str, Any], site: Site) -> str:
    """Silence some units in both ways; return what is wrong, or nothing."""
    try:
        error = distance(*both_ways(model, batch, site, {site.name: site}, some_units(site, 0)))
    except (RunError, RequestError) as failure:
        return str(failure)
    if error <= ROUNDING[torch.float32]:
        return ""
    return f"silencing its {site.kind}s in the weights differs from silencing them at the tap by {error:.1g}"


def _probe(inventory: Inventory, batch: Mapping[str, Any] | None) -> Probe:
    name = type(inventory.model).__name__
    try:
        probe = Probe(inventory, _batch(inventory, batch))
        once, again = (outputs(inventory.model, probe.batch) for _ in range(2))
    except RequestError:
        raise
    except Exception as failure:
        raise RequestError(
            f"{name}, whose family is unknown and which did not run ({failure})",
            expected="a small batch on which it runs",
            do="pass batch=...",
        ) from failure
    if distance(once, again) > 0:
        raise RequestError(
            f"{name}, whose family is unknown and whose outputs differ from pass to pass",
            expected="a model that is deterministic in evaluation mode",
            do="fix its random numbers, or write a family file",
        )
    return probe


def _batch(inventory: Inventory, batch: Mapping[str, Any] | None) -> dict[str, Any]:
    if batch is not None:
        return dict(batch)
    made = resolve("neurograft.worlds.pico.pico_batch")(inventory.model)
    device = next(inventory.model.parameters()).device
    return {k: v.to(device) for k, v in made.items()}
