"""Sites of residual channels, feature maps and whole layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from neurograft.anatomy._reading import AT, Reading, inside, label, whole
from neurograft.anatomy._types import Block, Branch
from neurograft.anatomy.inventory import norm_dim
from neurograft.anatomy.matrix import Matrix
from neurograft.core.units import Part, Site, Tap


def channels(reading: Reading) -> Iterator[Site]:
    """Yield the residual channels as each sub-layer writes them, and the feature maps of convolutions."""
    at = reading.at_or_offer(AT["channel"], "channel")
    if at == "residual":
        yield from (_stream(reading, b) for b in reading.anatomy.blocks if b.repeated)
        return
    done, mapped = set(), set(reading.anatomy.channels.values())
    for block in reading.anatomy.blocks:
        for branch in block.branches:
            if (site := _written(reading, branch)) is not None and not set(branch.writers) & mapped:
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


def _stream(reading: Reading, block: Block) -> Site:
    parts = tuple(p for b in block.branches for p in _rows_of(reading, b) or ())
    name = label(block.name, "channel", "residual")
    return Site(
        name, "channel", parts[0].n, parts, Tap(block.name, dim=block.dim), reading.layer(block.name), "residual"
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
    """Yield each block, or one sub-layer of each, as one unit."""
    for i, block in enumerate(b for b in reading.anatomy.blocks if b.repeated):
        roles = {b.role: b for b in block.branches}
        at = reading.at_or_offer(("", *roles, "residual"), "layer")
        if at is None:
            continue
        params = inside(reading, block.name)
        if at in roles:
            params = _branch_params(reading, block, roles[at], params)
        meant = list(roles.values()) if not at else [roles[at]] if at in roles else []
        written = {p for branch in meant for p in _out(reading, branch)}
        writes = tuple(j for j, p in enumerate(params) if p in written)
        parts = tuple(whole(reading, p) for p in params)
        yield Site(label(block.name, "layer", at), "layer", 1, parts, _layer_tap(reading, block, at), i, at, writes)


def _out(reading: Reading, branch: Branch) -> list[str]:
    """Return the parameters without which a branch contributes nothing."""
    banks = [p for b in branch.banks for p in (b.first.param, b.first.bias) if p is not None]
    return banks + [p for w in branch.writers for _, p in reading.inventory.own(w)]


def _branch_params(reading: Reading, block: Block, branch: Branch, params: list[str]) -> list[str]:
    """Return the parameters of a sub-layer: those of its attention or FFN, norms around it left out."""
    held = [branch.module, *branch.writers]
    for attention in block.attentions:
        if attention.o.module == branch.module:
            held += [s.module for s in attention.made.values()]
    for ffn in block.ffns:
        if ffn.down.module == branch.module:
            held += [s.module for s in (ffn.gate, ffn.up) if s is not None]
    owned = {p for module in held for p in inside(reading, module)}
    return [p for p in params if p in owned]


def _layer_tap(reading: Reading, block: Block, at: str) -> Tap | None:
    if not at:
        return None  # a block has as many contributions as sub-layers
    branches = [b for b in block.branches if at in (b.role, "residual")]
    rows = [p for b in branches for p in _rows_of(reading, b) or ()]
    if not rows:
        return None
    width = rows[0].n
    if at == "residual":
        return Tap(block.name, width=width, stride=width, dim=block.dim)
    return Tap(branches[0].module, width=width, stride=width, dim=_dim(reading, branches[0].writers))
