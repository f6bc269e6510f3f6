"""Prefixes: tokens that attention sees before its own, as keys and values of one module; an operation of grafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import Slice

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values put before those of an attention that masks nothing.

    Args:
        module: the attention's name; it has `q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim` and `scaling`.
        keys: [tokens, width], as the projection gives them.
        values: [tokens, width].
    """

    module: str
    keys: Tensor
    values: Tensor
    scalable = False

    def meta(self) -> dict[str, Any]:
        """Return plain data."""
        return {"type": "neurograft.core.prefix.Prefix", "module": self.module}

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors."""
        return {"keys": self.keys, "values": self.values}

    @staticmethod
    def from_parts(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Prefix:
        """Read what `meta` and `tensors` wrote."""
        return Prefix(meta["module"], tensors["keys"], tensors["values"])

    def mount(self, model: nn.Module) -> Mounted:
        """Put it on.

        Raises:
            RequestError: the model has no such attention.
        """
        attention = dict(model.named_modules()).get(self.module)
        if attention is None or any(not hasattr(attention, n) for n in (*PROJECTIONS, "head_dim", "scaling")):
            raise RequestError(
                f"a prefix at {self.module!r}, which is no attention of this {type(model).__name__}",
                expected="an attention with q_proj, k_proj, v_proj and o_proj",
                do="apply the graft to the model it was made on",
            )
        return Mounted(attention, self.keys, self.values)

    def fold(self, model: nn.Module) -> dict[str, Slice]:
        """Refuse: no weight says what a token that is not there says."""
        raise RequestError(
            f"{self.describe()} as a weight change", expected="an operation", do="keep it as an operation of the graft"
        )

    def clashes(self, other: object) -> bool:
        """Say whether both stand at one attention."""
        return isinstance(other, Prefix) and other.module == self.module

    def scaled(self, s: float) -> Prefix:
        """Return itself at 1.

        Raises:
            RequestError: another strength.
        """
        if s != 1.0:
            raise RequestError(f"a strength of {s} for {self.describe()}", expected="1", do="leave it at strength 1")
        return self

    def describe(self) -> str:
        """Return a few words for messages."""
        return f"a prefix of {len(self.keys)} tokens at {self.module}"


class Mounted:
    """A prefix on an attention.

    Args:
        attention: the module.
        keys: [tokens, width], maybe under training.
        values: [tokens, width].
    """

    def __init__(self, attention: nn.Module, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.handle = attention.register_forward_hook(self._again, with_kwargs=True)

    def _again(self, module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if mask is not None:
            raise RequestError("a prefix under an attention mask", expected="no mask", do="give inputs of one length")
        keys, values = (
            torch.cat([t.to(x).expand(len(x), -1, -1), p(x)], 1)
            for t, p in ((self.keys, module.k_proj), (self.values, module.v_proj))
        )
        q, k, v = (t.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for t in (module.q_proj(x), keys, values))
        said = F.scaled_dot_product_attention(q, k, v, scale=module.scaling)
        return (module.o_proj(said.transpose(1, 2).flatten(2)), *out[1:])

    def remove(self) -> None:
        """Take it off without a trace."""
        self.handle.remove()
