"""How the modules of a network store their matrices: which numbers belong to an output or an input feature.

Rows of a matrix are its output features and columns its input features, whichever way it is stored: this is
where GPT-2's transposed Conv1D, convolution kernels and banks of experts stop being special.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from neurograft.core.errors import RequestError, near
from neurograft.core.units import Parameters, Part

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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


class Inventory:
    """The modules and parameters of a model, read once.

    Args:
        model: any module; only names and shapes are read, so it may be sharded, packed or on "meta".
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.parameters = Parameters.of(model)

    def __contains__(self, module: str) -> bool:
        return module in self.modules or self.get(module) is not None

    def get(self, path: str) -> nn.Module | None:
        """Return the module of that path, also a second name of a shared one; None if there is none."""
        if path in self.modules:
            return self.modules[path]
        found = self.model
        for step in path.split("."):
            held = getattr(found, step, None)
            if not isinstance(held, nn.Module):
                return None
            found = held
        return found

    def param(self, module: str, name: str) -> str | None:
        """Return the model's name of a module's parameter, the first one if it is tied; None if it has none."""
        return self.parameters.alias.get(f"{module}.{name}" if module else name)

    def shape(self, param: str) -> tuple[int, ...]:
        """Return a parameter's shape."""
        return tuple(self.parameters.by_name[param].shape)

    def own(self, module: str) -> Iterator[tuple[str, str]]:
        """Yield (short name, model's name) of the parameters a module holds itself."""
        for name, _ in self.modules[module].named_parameters(recurse=False):
            found = self.param(module, name)
            assert found is not None
            yield name, found

    def matrix(self, name: str) -> Matrix:
        """Return the matrix of a linear layer, convolution or router.

        Raises:
            RequestError: the module holds no matrix.
        """
        found = self.find_matrix(name)
        if found is None:
            raise RequestError(
                f"the module {name!r}, which holds no matrix",
                expected="a linear layer or a convolution",
                do=near(name, self.modules),
            )
        return found

    def find_matrix(self, name: str) -> Matrix | None:
        """Return the matrix of a module, or None if it is something else."""
        if f"{name}.base_layer" in self:  # PEFT's wrapper: the matrix is inside, what passes is what it returns
            return self.find_matrix(f"{name}.base_layer")
        module, weight, bias = self.get(name), self.param(name, "weight"), self.param(name, "bias")
        if module is None or weight is None or isinstance(module, nn.Embedding):
            return None
        if isinstance(module, nn.Linear):
            return Matrix(weight, module.out_features, module.in_features, bias=bias)
        shape = self.shape(weight)
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            return Matrix(weight, shape[1], shape[0], flipped=True, bias=bias)
        kernel = math.prod(shape[2:])
        if isinstance(module, CONVS):
            return Matrix(weight, shape[0], shape[1], kernel, bias=bias, dim=1, grouped=module.groups > 1)
        if isinstance(module, TRANSPOSED_CONVS):
            grouped = module.groups > 1
            return None if grouped else Matrix(weight, shape[1], shape[0], kernel, flipped=True, bias=bias, dim=1)
        return Matrix(weight, shape[0], shape[1], bias=bias) if len(shape) == 2 else None

    def bank(self, name: str, param: str) -> Bank | None:
        """Return a fused bank of experts, or None if the module has no such three-dimensional parameter.

        Transformers' experts modules say themselves whether they store [E, in, out] (`is_transposed`).
        """
        found = self.param(name, param)
        if found is None or len(self.shape(found)) != 3:
            return None
        experts, first, second = self.shape(found)
        bias = self.param(name, f"{param}_bias")
        if getattr(self.get(name), "is_transposed", False):
            return Bank(Matrix(found, second, first, flipped=True, bias=bias), experts)
        return Bank(Matrix(found, first, second, bias=bias), experts)

    def matrices(self, name: str) -> dict[str, Matrix | Bank]:
        """Return the matrices a module holds itself, by short parameter name: fused banks, or plain ones.

        Besides `weight` these are the packed projections of torch's own attention and recurrent layers.
        """
        own = dict(self.own(name))
        if hasattr(self.modules[name], "down_proj"):
            return {n: b for n in own if not n.endswith("bias") and (b := self.bank(name, n)) is not None}
        found: dict[str, Matrix | Bank] = {}
        for short, param in own.items():
            if short == "weight":
                matrix = self.find_matrix(name)
            elif "weight" in short and len(self.shape(param)) == 2:
                high, wide = self.shape(param)
                matrix = Matrix(param, high, wide, bias=own.get(short.replace("weight", "bias")))
            else:
                continue
            if matrix is not None:
                found[short] = matrix
        return found

    def owners(self, param: str) -> list[str]:
        """Return the modules that hold a parameter, under all its names."""
        names = (n for n, first in self.parameters.alias.items() if first == param)
        return [n.rpartition(".")[0] for n in names]


def norm_dim(module: nn.Module) -> int:
    """Return the feature axis of a norm."""
    first = isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm))
    return 1 if first or getattr(module, "data_format", "") == "channels_first" else -1


def taps_itself(module: nn.Module) -> bool:
    """Say whether a matrix's module returns exactly its product: a linear layer or a convolution.

    The output projection of torch's own attention is a linear layer that never runs.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D"
