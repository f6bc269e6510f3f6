"""Sites of neurons, heads and experts."""

from __future__ import annotations

from collections.abc import Iterator

from neurograft.anatomy._reading import AT, Reading, inside, label, parts_of, tap, whole
from neurograft.anatomy._types import Attention, Ffn
from neurograft.anatomy.matrix import Bank
from neurograft.core.units import Part, Site, Tap


def neurons(reading: Reading) -> Iterator[Site]:
    """Yield the hidden neurons of each FFN, those of each expert apart."""
    for block in reading.anatomy.blocks:
        for ffn in block.ffns:
            at = reading.at_or_offer(_neuron_ats(ffn), "neuron")
            if at is not None:
                yield _neuron(reading, ffn, at)


def _neuron_ats(ffn: Ffn) -> tuple[str, ...]:
    if ffn.expert is not None:
        return ("act",)  # nothing outside the bank's module sees the other two
    return ("act", "up") if ffn.gate is None else ("act", "gate", "up")


def _neuron(reading: Reading, ffn: Ffn, at: str) -> Site:
    made = [s for s in (ffn.gate, ffn.up) if s is not None]
    parts = [*parts_of(made), ffn.down.matrix.columns(ffn.down.span)]
    if at == "act":
        writes: tuple[int, ...] = (len(parts) - 1,)
        passes = Tap(ffn.down.module, "input", dim=ffn.down.matrix.dim, expert=ffn.expert)
    else:
        slot = ffn.gate if at == "gate" else ffn.up
        assert slot is not None
        first = 0 if slot is made[0] else len(parts_of(made[:1]))
        writes = tuple(range(first, first + len(parts_of([slot]))))
        found = tap(slot, "output")
        assert found is not None
        passes = found
    name = label(ffn.module, "neuron", at, default="act")
    return Site(name, "neuron", ffn.down.span.n, tuple(parts), passes, reading.layer(ffn.module), at, writes)


def heads(reading: Reading) -> Iterator[Site]:
    """Yield the heads of each attention: query heads, or the key/value heads that they share."""
    for block in reading.anatomy.blocks:
        for attention in block.attentions:
            at = reading.at_or_offer(AT["head"] if "v" in attention.made else ("out",), "head")
            if at is not None:
                yield _head(reading, attention, at)


def _head(reading: Reading, attention: Attention, at: str) -> Site:
    made, o = attention.made, attention.o
    name, layer = label(attention.module, "head", at, default="out"), reading.layer(attention.module)
    if at == "kv":
        parts, values = parts_of([made["k"], made["v"]]), parts_of([made["v"]])
        writes = tuple(range(len(parts) - len(values), len(parts)))
        return Site(name, "head", made["v"].span.n, tuple(parts), tap(made["v"], "output"), layer, at, writes)
    parts = [*parts_of(s for s in made.values() if s.span.n == o.span.n), o.matrix.columns(o.span)]
    return Site(name, "head", o.span.n, tuple(parts), tap(o, "input"), layer, at, (len(parts) - 1,))


def experts(reading: Reading) -> Iterator[Site]:
    """Yield the experts of each mixture: one site for a fused bank, one for each separate module."""
    for block in reading.anatomy.blocks:
        for mixture in block.mixtures:
            at = reading.at_or_offer(("", "router") if mixture.router else ("",), "expert")
            if at is None:
                continue
            layer = reading.layer(mixture.module)
            if mixture.banks:
                n, parts = mixture.banks[0].n, tuple(p for bank in mixture.banks for p in _whole_experts(bank))
                down = 1 if mixture.banks[-1].first.bias is None else 2
                passes = Tap(mixture.router, "output") if at and mixture.router else None
                writes = () if at else tuple(range(len(parts) - down, len(parts)))
                yield Site(label(mixture.experts[0], "expert", at), "expert", n, parts, passes, layer, at, writes)
                continue
            for e, module in enumerate(mixture.experts):
                yield _expert_module(reading, module, Tap(mixture.router, start=e) if at and mixture.router else None)


def _whole_experts(bank: Bank) -> Iterator[Part]:
    m = bank.first
    size = m.high * m.wide
    yield Part(m.param, ((bank.n, size),), run=size)
    if m.bias is not None:
        yield Part(m.bias, ((bank.n, m.high),), run=m.high)


def _expert_module(reading: Reading, module: str, routed: Tap | None) -> Site:
    ffn = next(f for b in reading.anatomy.blocks for f in b.ffns if f.module == module)
    params = inside(reading, module)
    parts = tuple(whole(reading, p) for p in params)
    down = ffn.down.matrix
    writes = () if routed else tuple(i for i, p in enumerate(params) if p in (down.param, down.bias))
    passes = routed or Tap(ffn.down.module, "output", width=down.high, stride=down.high)
    at = "router" if routed else ""
    return Site(label(module, "expert", at), "expert", 1, parts, passes, reading.layer(module), at, writes)
