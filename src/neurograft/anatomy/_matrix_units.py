"""Sites of matrices, modules, norms, biases and words."""

from __future__ import annotations

from collections.abc import Iterator

from neurograft.anatomy._reading import AT, Reading, label, whole
from neurograft.anatomy.inventory import norm_dim, taps_itself
from neurograft.anatomy.matrix import Bank, Matrix
from neurograft.core.errors import RequestError
from neurograft.core.units import Part, Site, Tap


def modules(reading: Reading) -> Iterator[Site]:
    """Yield each module that holds parameters itself, as one unit."""
    seen: set[str] = set()
    for name in reading.inventory.modules:
        params = [p for _, p in reading.inventory.own(name) if p not in seen]
        seen.update(params)
        if not params:
            continue  # it holds nothing, or what another module holds already
        parts, matrix = tuple(whole(reading, p) for p in params), reading.inventory.find_matrix(name)
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


def norms(reading: Reading) -> Iterator[Site]:
    """Yield the features of each norm."""
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
    """Yield the entries of each bias."""
    for name in reading.inventory.modules:
        for short, param in reading.inventory.own(name):
            if (short == "bias" or short.endswith("_bias")) and reading.named(short):
                n = reading.inventory.parameters.by_name[param].numel()
                at = "" if short == "bias" else short
                yield Site(label(name, "bias", at), "bias", n, (Part.entries(param, n),), None, reading.layer(name), at)


def tokens(reading: Reading) -> Iterator[Site]:
    """Yield the words of the embedding, or of the output head."""
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
        for short, found in reading.inventory.matrices(name).items():
            first = found.first if isinstance(found, Bank) else found
            if first.param not in reading.embeddings and reading.named(short):
                yield name, "" if short == "weight" else short, found


def rows(reading: Reading) -> Iterator[Site]:
    """Yield the output features of each matrix, with their biases."""
    for name, at, m in _matrices(reading):
        parts = (m.each_row(), *m.each_shift()) if isinstance(m, Bank) else (m.rows(), *m.shifts())
        passes = None
        if isinstance(m, Matrix) and not at and taps_itself(reading.inventory.modules[name]):
            passes = Tap(name, "output", dim=m.dim)
        writes = tuple(range(len(parts)))
        yield Site(label(name, "row", at), "row", parts[0].n, parts, passes, reading.layer(name), at, writes)


def columns(reading: Reading) -> Iterator[Site]:
    """Yield the input features of each matrix."""
    for name, at, m in _matrices(reading):
        if isinstance(m, Matrix) and m.grouped:
            continue  # its input features meet some outputs only
        part = m.each_column() if isinstance(m, Bank) else m.columns()
        passes = None
        if isinstance(m, Matrix) and not at and taps_itself(reading.inventory.modules[name]):
            passes = Tap(name, "input", dim=m.dim)
        yield Site(label(name, "column", at), "column", part.n, (part,), passes, reading.layer(name), at, (0,))


def weights(reading: Reading) -> Iterator[Site]:
    """Yield the single weights of each matrix."""
    for name, at, m in _matrices(reading):
        part = m.each_entry() if isinstance(m, Bank) else m.entries()
        yield Site(label(name, "weight", at), "weight", part.n, (part,), None, reading.layer(name), at)


def blocks(reading: Reading) -> Iterator[Site]:
    """Yield the rectangles of a grid over each matrix."""
    for name, at, m in _matrices(reading):
        first = m.first if isinstance(m, Bank) else m
        if first.kernel > 1 or (reading.only is not None and label(name, "block", at) not in reading.only):
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
