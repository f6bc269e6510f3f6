"""Recognizing FFNs and attentions by what their linear layers' outputs reach."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from neurograft.anatomy._blocks import fused_spans
from neurograft.anatomy._names import repeated
from neurograft.anatomy._probe import Probe
from neurograft.anatomy.matrix import Span
from neurograft.core.seeds import generator

Entry = dict[str, Any]
NEAREST = 6  # earlier linear layers that are tried


def common(*names: str) -> str:
    """Return the innermost module that holds all of these modules.

    Example:
        >>> common("a.b.c", "a.b.d.e")
        'a.b'
    """
    steps = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*steps):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def relative(module: str, name: str) -> str:
    """Return a module's name within another."""
    return name.removeprefix(f"{module}.") if module else name


def _earlier(probe: Probe, name: str, used: Collection[str]) -> list[str]:
    """Return the unused layers that run before one, those that share the innermost module with it first."""
    before = [n for n in probe.order[: probe.order.index(name)] if n not in used]
    before = [n for n in before if repeated(probe.inventory, common(n, name))]
    before.reverse()
    return sorted(before, key=lambda n: -len(common(n, name)))  # stable: the nearest first


# FFNs


def ffn_of(probe: Probe, down: str, used: Collection[str]) -> Entry | str | None:
    """Return the FFN that a layer ends, as an entry of a family file; None if it ends none, or why it is refused."""
    wide = probe.matrices[down].wide
    found: list[str] = []
    mixed = ""
    for source in _earlier(probe, down, used)[:NEAREST]:
        high = probe.matrices[source].high
        if found and common(source, down) != common(found[0], down):
            break
        if high == 2 * wide and not found:
            entry = _fused_ffn(probe, down, source)
            if entry is not None:
                return entry
        if high == wide and all(one_to_one(probe, down, source, j, j) for j in _two(wide)):
            found.append(source)
        elif high == wide and probe.reached(down, source, 1 % wide) == [1 % wide]:
            mixed = f"a feature of {source} reaches {down} at other positions too"
        if len(found) == 2:
            break
    if not found:
        return mixed or None
    acts = [name for name in found if not linear(probe, down, name, 1, 1)]
    if len(found) == 1:
        return _entry(probe, down, up=found[0]) if acts else None
    if len(acts) == 2:
        return f"both factors of the gated pair before {down} pass an activation"
    gate = acts[0] if acts else found[1]
    return _entry(probe, down, gate=gate, up=next(n for n in found if n != gate))


def _entry(probe: Probe, down: str, **made: str) -> Entry:
    module, matrix = common(down, *made.values()), probe.matrices[down]
    paths = {role: relative(module, name) for role, name in made.items()}
    return {"module": module, **paths, "down": relative(module, down), "shape": [matrix.high, matrix.wide]}


def _fused_ffn(probe: Probe, down: str, source: str) -> Entry | None:
    wide = probe.matrices[down].wide
    for interleaved in (False, True):
        halves = [(2 * i, 2 * i + 1) if interleaved else (i, wide + i) for i in _two(wide)]
        if not all(one_to_one(probe, down, source, j, i) for i, pair in zip(_two(wide), halves) for j in pair):
            continue
        first, second = (linear(probe, down, source, j, _two(wide)[0]) for j in halves[0])
        if (first and second) or not (first or second):
            return None
        order = {"order": "up_gate"} if first else {}
        marks = {"interleaved": True} if interleaved else {}
        return {**_entry(probe, down, gate_up=source), **order, **marks}
    return None


def _two(count: int) -> tuple[int, int]:
    return 1 % count, (2 * count) // 3


def one_to_one(probe: Probe, reader: str, source: str, feature: int, expected: int) -> bool:
    """Say whether a feature of the source reaches one input feature of the reader, each position its own."""
    mask = probe.changed(reader, source, [feature], first=True)
    if mask is None or not bool(mask.any()):
        return False
    features = mask.reshape(-1, mask.shape[-1]).any(0).nonzero().reshape(-1).tolist()
    return features == [expected] and int(mask.any(-1).sum()) == probe.firsts(source)


def linear(probe: Probe, reader: str, source: str, feature: int, reached: int) -> bool:
    """Say whether what a feature reaches is a linear function of it."""
    base = probe.base(reader, source)
    moved = [probe.input_of(reader, source, [feature], times=t) for t in (1.0, -1.0, 2.0)]
    if base is None or any(m is None for m in moved):
        return False
    up, back, twice = ((m - base)[..., reached] for m in moved if m is not None)
    size = float(twice.abs().max())
    return float((up + back).abs().max()) < 1e-3 * size and float((twice - 2 * up).abs().max()) < 1e-3 * size


# Attentions


def attention_of(probe: Probe, o: str, used: Collection[str]) -> Entry | str | None:
    """Return the attention that a layer ends, as an entry of a family file; None if it ends none, or why not."""
    sources = [n for n in _earlier(probe, o, used) if n != o]
    sources = [n for n in sources if common(n, o) == common(sources[0], o)][::-1] if sources else []
    seen = {name: probe.reached(o, name, 0) for name in sources}
    fused = [n for n in sources if probe.matrices[n].high > probe.matrices[o].wide and seen[n]]
    if len(fused) == 1 and len([n for n in sources if seen[n]]) == 1:
        return _fused_attention(probe, o, fused[0])
    blocks = [n for n in sources if len(seen[n]) > 1 and _run(seen[n])]
    queries = [n for n in blocks if local(probe, o, n)]
    keys = [n for n in blocks if n not in queries]
    values = [n for n in sources if n not in blocks and seen[n] and not local(probe, o, n)]
    if not blocks and not values:
        return None
    if not (queries and keys and values):
        missing = [w for w, found in (("query", queries), ("key", keys), ("value", values)) if not found]
        spread = any(len(s) == probe.matrices[o].wide for s in seen.values())
        why = ": its features reach every head, as under a norm over all of them" if spread else ""
        return f"no {' and no '.join(missing)} projection that keeps heads apart was found before {o}{why}"
    return _separate_attention(probe, o, queries[0], keys, values, blocks, len(seen[queries[0]]))


def _separate_attention(
    probe: Probe, o: str, query: str, keys: Sequence[str], values: Sequence[str], also: Sequence[str], width: int
) -> Entry | str:
    heads = probe.matrices[o].wide // width
    value = values[-1]
    shared = probe.matrices[value].high // width
    like = [k for k in keys if probe.leading[k] == probe.leading[value]] or list(keys)
    key = next((k for k in like if probe.matrices[k].high == shared * width), like[0])
    spans = {query: heads, key: shared, value: shared}
    for name, count in spans.items():
        if width == probe.matrices[o].wide and count != 1:
            return f"features of {query} reach every head of {o}, as under a norm over all of them"
        if not count or heads % count or probe.matrices[name].high != count * width:
            return f"{name} makes {probe.matrices[name].high} features, not {count} heads of {width}"
        for feature in (count * width - 1, count * width // 2):
            expected = _expected("v" if name == value else "k", feature, heads, count, width)
            if probe.reached(o, name, feature) != expected:
                return f"feature {feature} of {name} does not reach the head of {o} it should"
    more = [n for n in also if n not in (query, key) and probe.matrices[n].high == heads * width]
    module = common(o, query, key, value)
    paths = {w: relative(module, n) for w, n in (("q", query), ("k", key), ("v", value), ("o", o))}
    others = {"also": [relative(module, n) for n in more]} if more else {}
    crosses = probe.read[key] != probe.read[query] and probe.read[key] == probe.read[value]
    role = {"role": "cross_attention"} if crosses else {}
    return _attention_entry(probe, o, {"module": module, **role, **paths, **others}, width)


def _attention_entry(probe: Probe, o: str, entry: Entry, width: int) -> Entry:
    matrix = probe.matrices[o]
    return {**entry, "width": width, "shape": [matrix.high, matrix.wide]}


def _expected(letter: str, feature: int, heads: int, count: int, width: int) -> list[int]:
    """Return the inputs of `o` that a feature of `count` stacked heads reaches."""
    each = heads // count
    head, inside = feature // width, feature % width
    start = head * each * width
    return (
        list(range(start, start + each * width)) if letter != "v" else [start + i * width + inside for i in range(each)]
    )


def _fused_attention(probe: Probe, o: str, source: str) -> Entry | str:
    high, wide = probe.matrices[source].high, probe.matrices[o].wide
    drawn = torch.randperm(high, generator=generator(0, "fused", source))[:10].tolist()
    seen = {j: probe.reached(o, source, j) for j in dict.fromkeys([0, high - 1, high // 2, *drawn])}
    width = min((len(s) for s in seen.values() if len(s) > 1 and _run(s)), default=0)
    if not width or wide % width or high % width or len(seen[0]) == wide > width:
        return f"the heads of the fused projection {source} could not be told apart"
    heads, shared = wide // width, (high // width - wide // width) // 2
    for layout in ("grouped", "stacked"):
        if shared < 1 or heads % shared or high != (heads + 2 * shared) * width:
            break
        spans = dict(zip("qkv", fused_spans(layout, heads, shared, width)))
        if all(_fits(j, s, spans, heads, width) for j, s in seen.items()):
            module = common(o, source)
            entry = {"module": module, "qkv": relative(module, source), "layout": layout, "o": relative(module, o)}
            return _attention_entry(probe, o, entry, width)
    return f"the layout of the fused projection {source} is neither stacked nor grouped"


def _fits(feature: int, reached: list[int], spans: dict[str, Span], heads: int, width: int) -> bool:
    for letter, span in spans.items():
        numbers = span_numbers(span)
        unit = feature - (feature - span.start) % width if feature >= span.start else -1
        if unit in numbers:
            stacked = numbers.index(unit) * width + feature - unit
            return reached == _expected(letter, stacked, heads, span.n, width)
    return False


def span_numbers(span: Span) -> list[int]:
    """Return the first feature of every unit of a span, in the order of the units."""
    numbers = [span.start]
    for count, stride in span.units:
        numbers = [n + i * stride for n in numbers for i in range(count)]
    return numbers


def _run(features: Sequence[int]) -> bool:
    return features[-1] - features[0] + 1 == len(features)


def local(probe: Probe, reader: str, source: str) -> bool:
    """Say whether the first position of the source reaches as many positions of the reader as were moved."""
    mask = probe.changed(reader, source, [0], first=True)
    return mask is not None and int(mask.any(-1).sum()) <= probe.firsts(source)
