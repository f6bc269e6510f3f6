"""Which layers of an unknown model form its attentions and FFNs: one of each pattern is asked, the others are alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from neurograft.anatomy._blocks import join
from neurograft.anatomy._find import Entry, attention_of, ffn_of, relative
from neurograft.anatomy._names import pattern, repeated
from neurograft.anatomy._probe import Probe
from neurograft.anatomy._types import Block


class Search:
    """The search through one model; one layer of each pattern of names and shapes is probed."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.inventory = probe, probe.inventory
        self.used: set[str] = set()
        self.reasons: dict[str, list[str]] = {}
        self.keys = {n: (pattern(self.inventory, n), m.high, m.wide) for n, m in probe.matrices.items()}
        self.ffns = list(self._look(ffn_of))
        self.attentions = list(self._look(attention_of))

    def _look(self, recognize: Any) -> Iterator[Entry]:
        tried = set()
        for name in self.probe.order:
            key = self.keys[name]
            if name in self.used or key in tried or not repeated(self.inventory, name):
                continue
            tried.add(key)
            entry = recognize(self.probe, name, self.used)
            if isinstance(entry, str):
                self.reasons.setdefault(key[0], []).append(entry)
            elif entry is not None and repeated(self.inventory, entry["module"]):
                paths = [
                    v for k, v in entry.items() if k in ("q", "k", "v", "o", "qkv", "gate", "up", "gate_up", "down")
                ]
                taken = {self.keys[join(entry["module"], p)] for p in (*paths, *entry.get("also", ()))}
                self.used.update(n for n, k in self.keys.items() if k in taken)
                yield entry

    def entries(self) -> dict[str, dict[str, list[Entry]]]:
        """Return what was found by the pattern of the block it lies in."""
        found: dict[str, dict[str, list[Entry]]] = {}
        for entry in self.attentions:
            block = repeated(self.inventory, entry["module"])[0]
            self._put(found, block, "attention", entry)
        lists = {key.rpartition(".")[0] for key in found}
        for entry in [*self.ffns, *self._banks()]:
            above = repeated(self.inventory, entry["module"])
            patterns = {a: pattern(self.inventory, a) for a in above}
            known = [a for a in above if patterns[a] in found]
            beside = [a for a in above if patterns[a].rpartition(".")[0] in lists]
            block = next(iter([*known, *beside, *above]))
            self._put(found, block, "ffn", entry)
        return found

    def _put(self, found: dict[str, dict[str, list[Entry]]], block: str, kind: str, entry: Entry) -> None:
        within = relative(block, entry["module"]) if entry["module"] != block else ""
        put = {**entry, "module": within}
        experts = re.fullmatch(r"(?:(.*)\.)?(\w*expert\w*)\.\w*\d+", within)
        if experts is not None:
            put = {**put, "module": experts[1] or "", "experts": experts[2]}
            put.pop("shape")
        self._of(found, block, kind).append(put)

    def _of(self, found: dict[str, dict[str, list[Entry]]], block: str, kind: str) -> list[Entry]:
        return found.setdefault(pattern(self.inventory, block), {}).setdefault(kind, [])

    def _banks(self) -> Iterator[Entry]:
        """Yield the fused banks, one of each pattern."""
        seen = set()
        for name in self.inventory.modules:
            key = pattern(self.inventory, name)
            bank = self.inventory.bank(name, "down_proj")
            if bank is None or key in seen or not repeated(self.inventory, name):
                continue
            seen.add(key)
            module, _, last = name.rpartition(".")
            beside = [n for n, _ in self.inventory.modules[module].named_children()]
            routers = [n for n in beside if (m := self.inventory.find_matrix(join(module, n))) and m.high == bank.n]
            yield {"module": module, "bank": last, **({"router": routers[0]} if len(routers) == 1 else {})}

    def unknown(self, blocks: list[Block]) -> list[str]:
        """Say which linear layers inside of blocks belong to nothing that was recognized."""
        known = {s.module for b in blocks for a in b.attentions for s in (*a.made.values(), a.o)}
        known |= {s.module for b in blocks for f in b.ffns for s in (f.gate, f.up, f.down) if s is not None}
        left: dict[str, str] = {}
        for name in self.probe.matrices:
            if name not in known and repeated(self.inventory, name):
                key = pattern(self.inventory, name)
                runs = "belongs to no attention or FFN that was recognized"
                why = (
                    runs
                    if name in self.probe.order
                    else "did not run by itself: its weight is used elsewhere, or unused"
                )
                left.setdefault(key, "; ".join(self.reasons.get(key, [why])))
        return [f"{key}: {why}" for key, why in left.items()]
