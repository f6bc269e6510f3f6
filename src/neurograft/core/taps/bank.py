"""Inside a fused bank of experts: what enters each expert's `down_proj`.

The hidden neurons of such experts are computed in the middle of one module's forward, where no hook reaches. While
somebody watches, the module runs transformers' eager implementation, expert by expert, and a torch function mode
sees the product of each expert's activations with its matrix of the bank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neurograft.core.errors import RequestError, RunError

Visit = Callable[[int, Tensor, Tensor], Tensor]

_T: Any = Tensor
PRODUCTS = frozenset({F.linear, torch.matmul, _T.matmul, _T.__matmul__, torch.mm, _T.mm})


class Bank:
    """A watched experts module.

    Args:
        module: has the parameter `down_proj` [E, ...] and a forward of (hidden, top_k_index [T, K], ...).
        visit: (expert, activations [rows, I], token numbers [rows]) -> the activations to go on with.

    Raises:
        RequestError: the module is no such bank.
    """

    def __init__(self, name: str, module: nn.Module, visit: Visit) -> None:
        self.name, self.module, self.visit = name, module, visit
        if not isinstance(getattr(module, "down_proj", None), Tensor):
            raise RequestError(
                f"the tap of an expert inside {name!r} ({type(module).__name__})",
                expected="a fused bank with a parameter down_proj",
                do="tap the experts' own modules",
            )
        self.parameters = list(inspect.signature(module.forward).parameters)
        self.held = module.__dict__.get("forward")
        self.plain = module.forward
        module.forward = self._run

    def remove(self) -> None:
        """Give the module its own forward back."""
        del self.module.__dict__["forward"]
        if self.held is not None:
            self.module.forward = self.held

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.parameters, args)), **kwargs}
        index = given.get("top_k_index", given.get("router_indices"))
        if not isinstance(index, Tensor) or index.dim() != 2:
            raise RunError(
                f"{self.name} was not told its tokens' experts as top_k_index [tokens, k]; it cannot be tapped"
            )
        config: Any = getattr(self.module, "config", None)
        chosen = getattr(config, "_experts_implementation", None)
        if chosen is not None:
            config._experts_implementation = "eager"
        try:
            with _Products(self, index):
                return self.plain(*args, **kwargs)
        finally:
            if chosen is not None:
                config._experts_implementation = chosen

    def expert(self, weight: Any) -> int | None:
        """Say which expert's matrix of `down_proj` a tensor shows, or None."""
        bank: Any = self.module.down_proj
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() != bank[0].numel():
            return None
        if weight.untyped_storage().data_ptr() != bank.untyped_storage().data_ptr():
            return None
        entry = weight.storage_offset() - bank.storage_offset()
        number, rest = divmod(entry, weight.numel())
        return number if rest == 0 and 0 <= number < bank.shape[0] else None


class _Products(TorchFunctionMode):
    def __init__(self, bank: Bank, index: Tensor) -> None:
        super().__init__()
        self.bank, self.index = bank, index

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and len(args) >= 2:
            number = self.bank.expert(args[1])
            if number is not None:
                # The eager implementation lists an expert's tokens choice by choice: `where` on [K, T].
                tokens = (self.index == number).t().nonzero()[:, 1]
                if len(tokens) != len(args[0]):
                    raise RunError(
                        f"{self.bank.name} hands {len(args[0])} activations to expert {number}, which was chosen for "
                        f"{len(tokens)} tokens; this bank's eager implementation is not known here"
                    )
                args = (self.bank.visit(number, args[0], tokens), *args[1:])
        return func(*args, **(kwargs or {}))
