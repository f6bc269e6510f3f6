"""How matrices lie in their parameters: which numbers belong to an output or an input feature.

Rows of a matrix are its output features and columns its input features, whichever way it is stored: this is
where GPT-2's transposed Conv1D, convolution kernels and banks of experts stop being special.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from neurograft.core.units import Part


@dataclass(frozen=True)
class Span:
    """Like units along one side of a matrix, counted in features.

    Args:
        units: (count, stride) of each digit of a unit's number, slowest first.
        start: first feature of unit 0.
        width: neighbouring features of one unit.
    """

    units: tuple[tuple[int, int], ...]
    start: int = 0
    width: int = 1

    @staticmethod
    def of(count: int, *, start: int = 0, width: int = 1, stride: int | None = None) -> Span:
        """Return `count` units, one after another unless `stride` says otherwise.

        Example:
            >>> Span.of(3, width=2).units
            ((3, 2),)
        """
        return Span(((count, width if stride is None else stride),), start, width)

    @property
    def n(self) -> int:
        """How many units there are."""
        return math.prod(count for count, _ in self.units)


@dataclass(frozen=True)
class Matrix:
    """A matrix of a network, with its bias, as it lies in its parameters.

    Args:
        param: parameter that holds it.
        high: output features.
        wide: input features.
        kernel: numbers for each pair of an output and an input feature (a convolution's window).
        flipped: stored [in, out, kernel] instead of [out, in, kernel].
        start: its first entry, in a bank of matrices.
        bias: parameter that holds the bias, if there is one.
        bias_start: the bias's first entry, in a bank.
        dim: feature axis of its activations, 1 for convolutions.
        grouped: whether an input feature is seen by some output features only.
    """

    param: str
    high: int
    wide: int
    kernel: int = 1
    flipped: bool = False
    start: int = 0
    bias: str | None = None
    bias_start: int = 0
    dim: int = -1
    grouped: bool = False

    def rows(self, span: Span | None = None) -> Part:
        """Return the weights into the output features of some units, all features one by one if `span` is None."""
        return self._side(span or Span.of(self.high), outer=not self.flipped)

    def columns(self, span: Span | None = None) -> Part:
        """Return the weights from the input features of some units."""
        return self._side(span or Span.of(self.wide), outer=self.flipped)

    def shifts(self, span: Span | None = None) -> tuple[Part, ...]:
        """Return the bias entries of some units, as one part, or none where there is no bias."""
        if self.bias is None:
            return ()
        span = span or Span.of(self.high)
        return (Part(self.bias, span.units, run=span.width, start=self.bias_start + span.start),)

    def entries(self) -> Part:
        """Return every single weight, numbered output feature by output feature."""
        if not self.flipped:
            across = self.wide * self.kernel
            return Part(self.param, ((self.high, across), (across, 1)), start=self.start)
        digits = ((self.high, self.kernel), (self.wide, self.high * self.kernel), (self.kernel, 1))
        return Part(self.param, digits[: 2 if self.kernel == 1 else 3], start=self.start)

    def blocks(self, size: tuple[int, int]) -> Part:
        """Return the blocks of a grid, `size` in (output, input) features."""
        high, wide = size
        grid: tuple[tuple[int, int], ...]
        if self.flipped:
            grid = ((self.high // high, high), (self.wide // wide, wide * self.high))
            return Part(self.param, grid, repeat=wide, run=high, repeat_stride=self.high, start=self.start)
        grid = ((self.high // high, high * self.wide), (self.wide // wide, wide))
        return Part(self.param, grid, repeat=high, run=wide, repeat_stride=self.wide, start=self.start)

    def _side(self, span: Span, *, outer: bool) -> Part:
        outer_count, inner_count = (self.wide, self.high) if self.flipped else (self.high, self.wide)
        step = inner_count * self.kernel if outer else self.kernel
        return Part(
            self.param,
            tuple((count, stride * step) for count, stride in span.units),
            repeat=1 if outer else outer_count,
            run=span.width * step,
            repeat_stride=0 if outer else inner_count * self.kernel,
            start=self.start + span.start * step,
        )


@dataclass(frozen=True)
class Bank:
    """Matrices of one shape in one parameter, one for each expert.

    Args:
        first: the first expert's matrix.
        n: how many there are.
    """

    first: Matrix
    n: int

    def __getitem__(self, expert: int) -> Matrix:
        size = self.first.high * self.first.wide
        return replace(self.first, start=expert * size, bias_start=expert * self.first.high)

    def all_rows(self) -> Part:
        """Return as units the output features, each with its weights in every matrix of the bank."""
        m = self.first
        if m.flipped:
            return Part(m.param, ((m.high, 1),), repeat=self.n * m.wide, run=1, repeat_stride=m.high)
        return Part(m.param, ((m.high, m.wide),), repeat=self.n, run=m.wide, repeat_stride=m.high * m.wide)

    def all_shifts(self) -> tuple[Part, ...]:
        """Return as units the output features, each with its bias in every matrix of the bank."""
        m = self.first
        return (Part(m.bias, ((m.high, 1),), repeat=self.n, run=1, repeat_stride=m.high),) if m.bias else ()

    def each_row(self) -> Part:
        """Return as units every output feature of every matrix."""
        m, size = self.first, self.first.high * self.first.wide
        if m.flipped:
            return Part(m.param, ((self.n, size), (m.high, 1)), repeat=m.wide, run=1, repeat_stride=m.high)
        return Part(m.param, ((self.n * m.high, m.wide),), run=m.wide)

    def each_shift(self) -> tuple[Part, ...]:
        """Return as units every bias entry of every matrix."""
        return (Part(self.first.bias, ((self.n * self.first.high, 1),)),) if self.first.bias else ()

    def each_column(self) -> Part:
        """Return as units every input feature of every matrix."""
        m, size = self.first, self.first.high * self.first.wide
        if m.flipped:
            return Part(m.param, ((self.n * m.wide, m.high),), run=m.high)
        return Part(m.param, ((self.n, size), (m.wide, 1)), repeat=m.high, run=1, repeat_stride=m.wide)

    def each_block(self, size: tuple[int, int]) -> Part:
        """Return as units the blocks of a grid over every matrix."""
        part = self.first.blocks(size)
        return replace(part, units=((self.n, self.first.high * self.first.wide), *part.units))

    def each_entry(self) -> Part:
        """Return every single weight of every matrix, numbered output feature by output feature."""
        m, size = self.first, self.first.high * self.first.wide
        if m.flipped:
            return Part(m.param, ((self.n, size), (m.high, 1), (m.wide, m.high)))
        return Part(m.param, ((self.n * m.high, m.wide), (m.wide, 1)))
