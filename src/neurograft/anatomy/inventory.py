"""Which matrices the modules of a model hold, whatever class they are of."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from neurograft.anatomy.matrix import Bank, Matrix
from neurograft.core.errors import RequestError, near
from neurograft.core.linears import is_linear, transposed
from neurograft.core.units import Parameters

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
        if transposed(module):
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
    return is_linear(module) or isinstance(module, nn.modules.conv._ConvNd)
