"""The residual stream behind a sub-layer, to be read or added to: what entered its block plus what it contributes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from neurograft.core.errors import RunError


class Behind:
    """Shows the stream behind a module that writes to it, and adds what it is told.

    Args:
        model: the model.
        module: its output is shown; where `block` is given, its output is a contribution h + c, and h + c is shown.
        block: the module whose first input is h, or None.
        visit: stream [..., n] -> what to add to it, or None.
        dim: the feature axis of the module's output.

    Example:
        >>> net = nn.Sequential(nn.Identity())
        >>> seat = Behind(net, "0", "", lambda stream: None)
        >>> seat.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        module: str,
        block: str | None,
        visit: Callable[[Tensor], Tensor | None],
        *,
        dim: int = -1,
    ) -> None:
        self.module, self.visit, self.dim, self.entered, self.hooks = module, visit, dim, None, list[Any]()
        self.owner = None if block is None else model.get_submodule(block)
        if self.owner is not None:
            self.hooks.append(self.owner.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.hooks.append(model.get_submodule(module).register_forward_hook(self._leave))

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()
        self.entered = None

    def _enter(self, owner: nn.Module, args: Any, kwargs: Any) -> None:
        self.entered = args[0] if args else kwargs[next(iter(inspect.signature(owner.forward).parameters))]

    def _leave(self, module: nn.Module, args: Any, out: Any) -> Any:
        whole = out if isinstance(out, Tensor) else out[0]
        added = whole.movedim(self.dim, -1)
        stream = added
        if self.owner is not None:
            if self.entered is None:
                raise RunError(f"{self.module} ran outside of its block, so the stream behind it is not known")
            if self.entered.shape != added.shape:
                raise RunError(
                    f"{self.module} adds {tuple(added.shape)} to what entered its block, of another shape "
                    f"{tuple(self.entered.shape)}; take the stream behind whole blocks (at='residual')"
                )
            stream = self.entered + added
            if not getattr(self.owner, "gradient_checkpointing", False):
                self.entered = None  # one that is recomputed in the backward pass needs it again
        update = self.visit(stream)
        if update is None:
            return None
        made = (added + update).movedim(-1, self.dim)  # through the contribution, so that the block's residual has it
        return made if isinstance(out, Tensor) else type(out)((made, *out[1:]))
