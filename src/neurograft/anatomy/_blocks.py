"""Reading a block of a network by the entries of a family file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from neurograft.anatomy._types import Attention, Block, Branch, Ffn, Mixture, Slot
from neurograft.anatomy.inventory import Inventory
from neurograft.anatomy.matrix import Bank, Matrix, Span


def read_block(
    inventory: Inventory, name: str, entries: Mapping[str, Any], family: str, *, repeated: bool = True
) -> Block | None:
    """Return what the entries say of a block, or None if none of them fits its modules."""
    attentions = [a for e in entries.get("attention", ()) if (a := _attention(inventory, name, e))]
    branches = [Branch(a.role, a.o.module, (a.o.module,)) for a in attentions]
    ffns: list[Ffn] = []
    mixtures: list[Mixture] = []
    for entry in entries.get("ffn", ()):
        if "bank" in entry or "experts" in entry:
            found = _mixture(inventory, name, entry)
            if found is not None:
                mixtures.append(found[0])
                ffns.extend(found[1])
                branches.append(found[2])
        elif (ffn := _ffn(inventory, name, entry)) is not None:
            ffns.append(ffn)
            branches.append(Branch(ffn.role, ffn.down.module, (ffn.down.module,)))
    for role, entry in entries.get("mix", {}).items():
        module, writers = join(name, entry["module"]), tuple(join(name, w) for w in entry["writes"])
        if all(m in inventory for m in (module, *writers)):
            branches.append(Branch(role, module, writers))
    if not branches:
        return None
    distinct, dim = tuple(_distinct(branches, mixtures)), entries.get("dim", -1)
    return Block(name, family, tuple(attentions), tuple(ffns), tuple(mixtures), distinct, repeated, dim)


def _distinct(branches: list[Branch], mixtures: list[Mixture]) -> list[Branch]:
    """Fold FFNs that a mixture adds to its experts into its branch, and number roles that come twice."""
    routed = {m.module for m in mixtures}
    added = [b for b in branches if any(b.module.startswith(f"{m}.") for m in routed)]
    count: Counter[str] = Counter()
    found = []
    for branch in branches:
        if branch in added:
            continue
        count[branch.role] += 1
        role = branch.role if count[branch.role] == 1 else f"{branch.role}_{count[branch.role]}"
        inside = [b for b in added if branch.module in routed and b.module.startswith(f"{branch.module}.")]
        writers = dict.fromkeys(w for b in (branch, *inside) for w in b.writers)
        found.append(replace(branch, role=role, writers=tuple(writers)))
    return found


def join(*steps: str) -> str:
    """Join module names, empty ones left out."""
    return ".".join(s for s in steps if s)


def attribute(module: nn.Module, path: str) -> Any:
    """Return an attribute of a module by its dotted path."""
    found: Any = module
    for step in path.split("."):
        found = getattr(found, step)
    return found


def _attention(inventory: Inventory, block: str, entry: Mapping[str, Any]) -> Attention | None:
    module = join(block, entry["module"])
    paths = [entry[k] for k in ("q", "k", "v", "o", "qkv", "kv") if k in entry]
    if not _applies(inventory, module, paths, entry):
        return None
    held = inventory.get(module)
    assert held is not None
    o = _slot(inventory, join(module, entry["o"]))
    said = entry["width"] if "width" in entry else entry["heads"]
    said = said if isinstance(said, int) else int(attribute(held, said))
    width = said if "width" in entry else o.matrix.wide // said
    heads = o.matrix.wide // width
    made = dict(_made(inventory, module, entry, heads, width))
    for i, path in enumerate(entry.get("also", ())):
        if join(module, path) in inventory:
            made[f"also{i}"] = _cut(inventory, join(module, path), heads)
    o = Slot(o.module, o.matrix, Span.of(heads, width=width))
    return Attention(module, entry.get("role", "attention"), made, o, entry.get("mixed", False))


def _applies(inventory: Inventory, module: str, paths: Iterable[str], entry: Mapping[str, Any]) -> bool:
    """Say whether an entry's modules exist and have the classes it asks for."""
    named = {join(module, path): cls for path, cls in entry.get("classes", {}).items()}
    if not all(join(module, p) in inventory for p in paths):
        return False
    if "shape" in entry:
        last = inventory.matrix(join(module, entry["o"] if "o" in entry else entry["down"]))
        if [last.high, last.wide] != list(entry["shape"]):
            return False
    return all(type(inventory.get(path)).__name__ == cls for path, cls in named.items())


def _made(
    inventory: Inventory, module: str, entry: Mapping[str, Any], heads: int, width: int
) -> Iterator[tuple[str, Slot]]:
    if "qkv" in entry:
        fused = _slot(inventory, join(module, entry["qkv"]))
        shared = (fused.matrix.high // width - heads) // 2
        yield from (
            (letter, Slot(fused.module, fused.matrix, span))
            for letter, span in zip("qkv", fused_spans(entry["layout"], heads, shared, width))
        )
        return
    yield "q", _cut(inventory, join(module, entry["q"]), heads)
    if "kv" in entry:
        fused = _slot(inventory, join(module, entry["kv"]))
        for i, letter in enumerate("kv"):
            yield letter, Slot(fused.module, fused.matrix, Span.of(heads, start=i * heads * width, width=width))
        return
    value = _slot(inventory, join(module, entry["v"]))
    shared = value.matrix.high // width
    yield "k", _cut(inventory, join(module, entry["k"]), shared)
    yield "v", Slot(value.module, value.matrix, Span.of(shared, width=width))


def fused_spans(layout: str, heads: int, shared: int, width: int) -> tuple[Span, Span, Span]:
    """Return where the queries of `heads` heads and keys and values of `shared` heads lie in a fused projection.

    Example:
        >>> fused_spans("grouped", 4, 4, 8)[1]  # NeoX: head after head, each with its q, k and v
        Span(units=((4, 24),), start=8, width=8)
    """
    if layout == "stacked":
        starts = (0, heads * width, (heads + shared) * width)
        q, k, v = (Span.of(n, start=s, width=width) for n, s in zip((heads, shared, shared), starts))
        return q, k, v
    each = heads // shared
    group = (each + 2) * width
    query = ((heads, group),) if each == 1 else ((shared, group), (each, width))
    return (
        Span(query, 0, width),
        Span.of(shared, start=each * width, width=width, stride=group),
        Span.of(shared, start=(each + 1) * width, width=width, stride=group),
    )


def _slot(inventory: Inventory, module: str) -> Slot:
    matrix = inventory.matrix(module)
    return Slot(module, matrix, Span.of(matrix.high))


def _cut(inventory: Inventory, module: str, heads: int) -> Slot:
    matrix = inventory.matrix(module)
    return Slot(module, matrix, Span.of(heads, width=matrix.high // heads))


def _ffn(inventory: Inventory, block: str, entry: Mapping[str, Any]) -> Ffn | None:
    module, role = join(block, entry["module"]), entry.get("role", "ffn")
    paths = {k: join(module, entry[k]) for k in ("up", "gate", "gate_up", "down") if k in entry}
    if not _applies(inventory, module, [entry[k] for k in paths], entry):
        return None
    down = inventory.matrix(paths["down"])
    read = Slot(paths["down"], down, Span.of(down.wide))
    if "gate_up" in paths:
        mixed = entry.get("interleaved", False)
        gate, up = _halves(inventory.matrix(paths["gate_up"]), paths["gate_up"], interleaved=mixed)
        if entry.get("order") == "up_gate":
            gate, up = up, gate
        return Ffn(module, role, up, read, gate)
    made = _slot(inventory, paths["up"])
    return Ffn(module, role, made, read, _slot(inventory, paths["gate"]) if "gate" in paths else None)


def _halves(matrix: Matrix, module: str, *, interleaved: bool) -> tuple[Slot, Slot]:
    half = matrix.high // 2
    stride, second = (2, 1) if interleaved else (1, half)
    gate, up = (Slot(module, matrix, Span.of(half, start=s, stride=stride)) for s in (0, second))
    return gate, up


def _mixture(inventory: Inventory, block: str, entry: Mapping[str, Any]) -> tuple[Mixture, list[Ffn], Branch] | None:
    module, role = join(block, entry["module"]), entry.get("role", "ffn")
    router = join(module, entry["router"]) if "router" in entry else None
    if router is not None and router not in inventory:
        return None
    shared = [f for e in entry.get("shared", ()) if (f := _ffn(inventory, module, {**e, "role": role}))]
    writers = tuple(f.down.module for f in shared)
    if "bank" in entry:
        experts = join(module, entry["bank"])
        if experts not in inventory or (down := inventory.bank(experts, "down_proj")) is None:
            return None
        ffns, banks = _fused(inventory, experts, down, role)
        mixture = Mixture(module, (experts,), banks, router)
        return mixture, [*ffns, *shared], Branch(role, module, writers, (down,))
    parent = inventory.get(join(module, entry["experts"]))
    if parent is None:
        return None
    names = tuple(join(module, entry["experts"], child) for child, _ in parent.named_children())
    inner = {k: v for k, v in entry.items() if k in ("up", "gate", "gate_up", "down")}
    each = [_ffn(inventory, n, {**inner, "module": "", "role": role}) for n in names]
    ffns = [f for f in each if f is not None]
    if len(ffns) != len(names) or not names:
        return None
    writers += tuple(f.down.module for f in ffns)
    return Mixture(module, names, (), router), [*ffns, *shared], Branch(role, module, writers)


def _fused(inventory: Inventory, experts: str, down: Bank, role: str) -> tuple[list[Ffn], tuple[Bank, ...]]:
    gated = inventory.bank(experts, "gate_up_proj")
    plain = gated or inventory.bank(experts, "up_proj")
    assert plain is not None
    interleaved = not getattr(inventory.get(experts), "is_concatenated", True)
    ffns = []
    for e in range(down.n):
        read = Slot(experts, down[e], Span.of(down.first.wide))
        gate, up = None, Slot(experts, plain[e], Span.of(plain.first.high))
        if gated is not None:
            gate, up = _halves(plain[e], experts, interleaved=interleaved)
        ffns.append(Ffn(f"{experts}.{e}", role, up, read, gate, expert=e))
    return ffns, (plain, down)
