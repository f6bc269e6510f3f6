"""Building the sites of each kind from what is known of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from neurograft.anatomy._blocks import Attention, Branch, Ffn, Slot
from neurograft.anatomy.describe import Anatomy
from neurograft.anatomy.matrix import Bank, Inventory, Matrix
from neurograft.core.errors import RequestError
from neurograft.core.units import Part, Site, Tap

# The activations of each kind, the default first; kinds that are missing take a parameter's short name.
AT: Mapping[str, tuple[str, ...]] = {
    "neuron": ("act", "gate", "up"),
    "head": ("out", "kv"),
    "expert": ("", "router"),
    "channel": ("", "residual"),
    "layer": ("", "attention", "cross_attention", "ffn", "residual"),
    "module": ("",),
    "norm": ("",),
    "token": ("embedding", "head"),
}


@dataclass
class Reading:
    """What the builders work from.

    Args:
        inventory: the model's modules and parameters.
        anatomy: what is known of them.
        at: the activation asked for, or None.
        block: block size asked for, or None.
        offered: activations that were met instead, for the error.
    """

    inventory: Inventory
    anatomy: Anatomy
    at: str | None = None
    block: int | tuple[int, int] | None = None
    offered: list[str] = field(default_factory=list)

    @cached_property
    def _layers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.anatomy.layers)}

    def layer(self, module: str) -> int | None:
        """Return the number of the block a module lies in."""
        while module:
            if module in self._layers:
                return self._layers[module]
            module = module.rpartition(".")[0]
        return None

    @cached_property
    def embeddings(self) -> set[str]:
        """Parameters of embeddings."""
        held = (n for n, m in self.inventory.modules.items() if isinstance(m, nn.Embedding))
        return {p for n in held if (p := self.inventory.param(n, "weight")) is not None}

    def at_or_offer(self, have: Iterable[str], kind: str) -> str | None:
        """Return the activation asked for (the kind's default if none was) if it is there, else note what is."""
        wanted = self.at or AT[kind][0]
        found = list(have)
        if wanted in found:
            return wanted
        self.offered.extend(a for a in found if a and a not in self.offered)
        return None

    def named(self, short: str) -> bool:
        """Say whether a parameter of that short name is asked for, and note that it is there."""
        if short not in self.offered:
            self.offered.append(short)
        return self.at in (None, short)


def label(module: str, kind: str, at: str = "", *, default: str = "") -> str:
    """Return a site's name."""
    return f"{module}/{kind}" + (f"@{at}" if at and at != default else "")


def tap(slot: Slot, side: str) -> Tap | None:
    """Return where the units of a slot pass; None if one number cannot say it."""
    span = slot.span
    if len(span.units) > 1:
        return None
    stride = span.units[0][1]
    return Tap(slot.module, side, span.start, span.width, stride, slot.matrix.dim)


def _parts(slots: Iterable[Slot]) -> list[Part]:
    return [part for s in slots for part in (s.matrix.rows(s.span), *s.matrix.shifts(s.span))]


def neurons(reading: Reading) -> Iterator[Site]:
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
    parts = [*_parts(made), ffn.down.matrix.columns(ffn.down.span)]
    if at == "act":
        writes: tuple[int, ...] = (len(parts) - 1,)
        passes = Tap(ffn.down.module, "input", dim=ffn.down.matrix.dim, expert=ffn.expert)
    else:
        slot = ffn.gate if at == "gate" else ffn.up
        assert slot is not None
        first = 0 if slot is made[0] else len(_parts(made[:1]))
        writes = tuple(range(first, first + len(_parts([slot]))))
        found = tap(slot, "output")
        assert found is not None
        passes = found
    name = label(ffn.module, "neuron", at, default="act")
    return Site(name, "neuron", ffn.down.span.n, tuple(parts), passes, reading.layer(ffn.module), at, writes)


def heads(reading: Reading) -> Iterator[Site]:
    for block in reading.anatomy.blocks:
        for attention in block.attentions:
            at = reading.at_or_offer(AT["head"] if "v" in attention.made else ("out",), "head")
            if at is not None:
                yield _head(reading, attention, at)


def _head(reading: Reading, attention: Attention, at: str) -> Site:
    made, o = attention.made, attention.o
    name, layer = label(attention.module, "head", at, default="out"), reading.layer(attention.module)
    if at == "kv":
        parts, values = _parts([made["k"], made["v"]]), _parts([made["v"]])
        writes = tuple(range(len(parts) - len(values), len(parts)))
        return Site(name, "head", made["v"].span.n, tuple(parts), tap(made["v"], "output"), layer, at, writes)
    parts = [*_parts(s for s in made.values() if s.span.n == o.span.n), o.matrix.columns(o.span)]
    return Site(name, "head", o.span.n, tuple(parts), tap(o, "input"), layer, at, (len(parts) - 1,))


def experts(reading: Reading) -> Iterator[Site]:
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
    params = _inside(reading, module)
    parts = tuple(_whole(reading, p) for p in params)
    down = ffn.down.matrix
    writes = () if routed else tuple(i for i, p in enumerate(params) if p in (down.param, down.bias))
    passes = routed or Tap(ffn.down.module, "output", width=down.high, stride=down.high)
    at = "router" if routed else ""
    return Site(label(module, "expert", at), "expert", 1, parts, passes, reading.layer(module), at, writes)


def _inside(reading: Reading, module: str) -> list[str]:
    """Return the parameters of a module and all it holds, each once."""
    held = (n for n in reading.inventory.modules if n == module or n.startswith(f"{module}.") or not module)
    return list(dict.fromkeys(p for n in held for _, p in reading.inventory.own(n)))


def _whole(reading: Reading, param: str) -> Part:
    return Part.whole(param, reading.inventory.parameters.by_name[param].numel())


def channels(reading: Reading) -> Iterator[Site]:
    at = reading.at_or_offer(AT["channel"], "channel")
    if at == "residual":
        yield from (_stream(reading, b.name, b.branches) for b in reading.anatomy.blocks if b.repeated)
        return
    done = set()
    for block in reading.anatomy.blocks:
        for branch in block.branches:
            if (site := _written(reading, branch)) is not None:
                done.add(branch.module)
                yield site
    for name in reading.inventory.modules:
        matrix = reading.inventory.find_matrix(name)
        if matrix is not None and matrix.dim == 1 and name not in done:
            yield _feature_map(reading, name, matrix)


def _rows_of(reading: Reading, branch: Branch) -> list[Part] | None:
    parts = [p for bank in branch.banks for p in (bank.all_rows(), *bank.all_shifts())]
    for writer in branch.writers:
        matrix = reading.inventory.find_matrix(writer)
        if matrix is not None:
            parts += [matrix.rows(), *matrix.shifts()]
        else:
            parts += [Part.entries(p, reading.inventory.shape(p)[0]) for _, p in reading.inventory.own(writer)]
    return parts if len({p.n for p in parts}) == 1 else None


def _written(reading: Reading, branch: Branch) -> Site | None:
    parts = _rows_of(reading, branch)
    if parts is None:
        return None
    name, layer = label(branch.module, "channel"), reading.layer(branch.module)
    passes = Tap(branch.module, "output", dim=_dim(reading, branch.writers))
    return Site(name, "channel", parts[0].n, tuple(parts), passes, layer, "", tuple(range(len(parts))))


def _dim(reading: Reading, writers: Iterable[str]) -> int:
    for writer in writers:
        matrix = reading.inventory.find_matrix(writer)
        return matrix.dim if matrix is not None else norm_dim(reading.inventory.modules[writer])
    return -1


def norm_dim(module: nn.Module) -> int:
    """Return the feature axis of a norm."""
    first = isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm))
    return 1 if first or getattr(module, "data_format", "") == "channels_first" else -1


def _stream(reading: Reading, block: str, branches: Iterable[Branch]) -> Site:
    parts = [p for b in branches for p in _rows_of(reading, b) or ()]
    dim = _dim(reading, [w for b in branches for w in b.writers])
    layer = reading.layer(block)
    return Site(
        label(block, "channel", "residual"), "channel", parts[0].n, tuple(parts), Tap(block, dim=dim), layer, "residual"
    )


def _feature_map(reading: Reading, name: str, matrix: Matrix) -> Site:
    parts, passes, writes = (
        [matrix.rows(), *matrix.shifts()],
        Tap(name, "output", dim=1),
        (0, 1)[: 1 + bool(matrix.bias)],
    )
    norm = reading.anatomy.channels.get(name)
    if norm is not None:
        own = [Part.entries(p, matrix.high) for _, p in reading.inventory.own(norm)]
        writes = tuple(range(len(parts), len(parts) + len(own)))
        parts, passes = [*parts, *own], Tap(norm, "output", dim=1)
    return Site(label(name, "channel"), "channel", matrix.high, tuple(parts), passes, reading.layer(name), "", writes)


def layers(reading: Reading) -> Iterator[Site]:
    for i, block in enumerate(b for b in reading.anatomy.blocks if b.repeated):
        roles = {b.role: b for b in block.branches}
        at = reading.at_or_offer(("", *roles, "residual"), "layer")
        if at is None:
            continue
        params = _inside(reading, block.name)
        if at in roles:
            params = _branch_params(reading, roles[at], params)
        written = {
            p for b in (roles.values() if not at else [roles[at]] if at in roles else []) for p in _out(reading, b)
        }
        writes = tuple(j for j, p in enumerate(params) if p in written)
        parts = tuple(_whole(reading, p) for p in params)
        yield Site(
            label(block.name, "layer", at), "layer", 1, parts, _layer_tap(reading, block.name, roles, at), i, at, writes
        )


def _out(reading: Reading, branch: Branch) -> list[str]:
    """Return the parameters without which a branch contributes nothing."""
    banks = [p for b in branch.banks for p in (b.first.param, b.first.bias) if p is not None]
    return banks + [p for w in branch.writers for _, p in reading.inventory.own(w)]


def _branch_params(reading: Reading, branch: Branch, params: list[str]) -> list[str]:
    """Return the parameters of a sub-layer: those of its attention or FFN, norms around it left out."""
    for block in reading.anatomy.blocks:
        for attention in block.attentions:
            if attention.o.module == branch.module:
                held = [s.module for s in (*attention.made.values(), attention.o)]
                return [p for p in params if p in {q for m in held for q in _inside(reading, m)}]
        mixture = next((m for m in block.mixtures if m.module == branch.module), None)
        if mixture is not None:
            return [p for p in params if p in set(_inside(reading, mixture.module))]
        for ffn in block.ffns:
            if ffn.down.module == branch.module:
                held = [s.module for s in (ffn.gate, ffn.up, ffn.down) if s is not None]
                return [p for p in params if p in {q for m in held for q in _inside(reading, m)}]
    inside = set(_inside(reading, branch.module))
    return [p for p in params if p in inside]


def _layer_tap(reading: Reading, block: str, roles: Mapping[str, Branch], at: str) -> Tap | None:
    if not at:
        return None  # a block has as many contributions as sub-layers
    branch = roles.get(at)
    rows = _rows_of(reading, branch) if branch else [p for b in roles.values() for p in _rows_of(reading, b) or ()]
    if not rows:
        return None
    width, module = rows[0].n, branch.module if branch else block
    dim = _dim(reading, [w for b in ([branch] if branch else roles.values()) for w in b.writers])
    return Tap(module, "output", width=width, stride=width, dim=dim)


def modules(reading: Reading) -> Iterator[Site]:
    for name in reading.inventory.modules:
        params = [p for _, p in reading.inventory.own(name)]
        if not params:
            continue
        parts, matrix = tuple(_whole(reading, p) for p in params), reading.inventory.find_matrix(name)
        module = reading.inventory.modules[name]
        passes: Tap | None = None
        writes: tuple[int, ...] = ()
        if matrix is not None and taps_itself(module):
            passes = Tap(name, "output", width=matrix.high, stride=matrix.high, dim=matrix.dim)
        elif name in reading.anatomy.norms:
            width = reading.inventory.shape(params[0])[0]
            passes = Tap(name, "output", width=width, stride=width, dim=norm_dim(module))
        if passes is not None and name not in reading.anatomy.one_plus:
            writes = tuple(range(len(parts)))
        yield Site(label(name, "module"), "module", 1, parts, passes, reading.layer(name), "", writes)


def taps_itself(module: nn.Module) -> bool:
    """Say whether a matrix's module returns exactly its product: a linear layer or a convolution."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D"


def norms(reading: Reading) -> Iterator[Site]:
    for name in reading.anatomy.norms:
        own = dict(reading.inventory.own(name))
        gain = own["weight"]
        n = reading.inventory.shape(gain)[0]
        params = [gain, *([own["bias"]] if "bias" in own else [])]
        parts = tuple(Part.entries(p, n) for p in params)
        writes = () if name in reading.anatomy.one_plus else tuple(range(len(parts)))
        passes = Tap(name, "output", dim=norm_dim(reading.inventory.modules[name]))
        yield Site(label(name, "norm"), "norm", n, parts, passes, reading.layer(name), "", writes)


def biases(reading: Reading) -> Iterator[Site]:
    for name in reading.inventory.modules:
        for short, param in reading.inventory.own(name):
            if (short == "bias" or short.endswith("_bias")) and reading.named(short):
                n = reading.inventory.parameters.by_name[param].numel()
                at = "" if short == "bias" else short
                yield Site(label(name, "bias", at), "bias", n, (Part.entries(param, n),), None, reading.layer(name), at)


def tokens(reading: Reading) -> Iterator[Site]:
    embedding, head = reading.anatomy.embedding, reading.anatomy.head
    weight = reading.inventory.param(embedding, "weight") if embedding is not None else None
    if embedding is None or weight is None:
        return
    words, wide = reading.inventory.shape(weight)
    matrix = reading.inventory.find_matrix(head) if head is not None else None
    speaks = matrix is not None and matrix.high == words
    at = reading.at_or_offer(AT["token"] if speaks else ("embedding",), "token")
    if at == "embedding":
        yield Site(label(embedding, "token"), "token", words, (Part.rows(weight, (words, wide)),), at=at)
    elif at == "head" and matrix is not None and head is not None:
        parts = (matrix.rows(), *matrix.shifts())
        passes = Tap(head, "output")
        yield Site(label(head, "token", at), "token", words, parts, passes, None, at, tuple(range(len(parts))))


def _matrices(reading: Reading) -> Iterator[tuple[str, str, Matrix | Bank]]:
    """Yield (module, at, matrix or bank) of all weights that are no embedding; `at` is "" for plain weights."""
    for name in reading.inventory.modules:
        own = dict(reading.inventory.own(name))
        for short, bank in reading.inventory.banks(name).items():
            if reading.named(short):
                yield name, short, bank
        matrix = reading.inventory.find_matrix(name) if "weight" in own else None
        if matrix is not None and matrix.param not in reading.embeddings and reading.named("weight"):
            yield name, "", matrix


def rows(reading: Reading) -> Iterator[Site]:
    for name, at, m in _matrices(reading):
        parts = (m.each_row(), *m.each_shift()) if isinstance(m, Bank) else (m.rows(), *m.shifts())
        passes = None
        if isinstance(m, Matrix) and taps_itself(reading.inventory.modules[name]):
            passes = Tap(name, "output", dim=m.dim)
        writes = tuple(range(len(parts)))
        yield Site(label(name, "row", at), "row", parts[0].n, parts, passes, reading.layer(name), at, writes)


def columns(reading: Reading) -> Iterator[Site]:
    for name, at, m in _matrices(reading):
        if isinstance(m, Matrix) and m.grouped:
            continue  # its input features meet some outputs only
        part = m.each_column() if isinstance(m, Bank) else m.columns()
        passes = None
        if isinstance(m, Matrix) and taps_itself(reading.inventory.modules[name]):
            passes = Tap(name, "input", dim=m.dim)
        yield Site(label(name, "column", at), "column", part.n, (part,), passes, reading.layer(name), at, (0,))


def weights(reading: Reading) -> Iterator[Site]:
    for name, at, m in _matrices(reading):
        part = m.each_entry() if isinstance(m, Bank) else m.entries()
        yield Site(label(name, "weight", at), "weight", part.n, (part,), None, reading.layer(name), at)


def blocks(reading: Reading) -> Iterator[Site]:
    for name, at, m in _matrices(reading):
        first = m.first if isinstance(m, Bank) else m
        if first.kernel > 1:
            continue
        size = block_size(reading.block, (first.high, first.wide), name)
        part = m.each_block(size) if isinstance(m, Bank) else m.blocks(size)
        yield Site(label(name, "block", at), "block", part.n, (part,), None, reading.layer(name), at)


def block_size(asked: int | tuple[int, int] | None, matrix: tuple[int, int], name: str) -> tuple[int, int]:
    """Return the block size for a matrix.

    Raises:
        RequestError: the size asked for does not divide the matrix.
    """
    if asked is None:
        high, wide = (min(side & -side, 64) for side in matrix)
        return high, wide
    size = (asked, asked) if isinstance(asked, int) else (int(asked[0]), int(asked[1]))
    if any(s < 1 or side % s for s, side in zip(size, matrix)):
        raise RequestError(
            f"block={size} for {name!r}, a matrix of {matrix[0]} x {matrix[1]}",
            expected="a size that divides the matrix",
            do=f"use divisors such as {tuple(min(side & -side, 64) for side in matrix)}, or narrow with match=",
        )
    return size


BUILDERS: Mapping[str, Callable[[Reading], Iterator[Site]]] = {
    "weight": weights, "row": rows, "column": columns, "block": blocks, "neuron": neurons, "head": heads,
    "expert": experts, "channel": channels, "layer": layers, "module": modules, "norm": norms, "bias": biases,
    "token": tokens,
}  # fmt: skip
