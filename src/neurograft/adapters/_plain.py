"""What an adapter asks for that cannot be trained on top of other grafts."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.grafts.stack import Stack


def need_plain(model: nn.Module, names: Iterable[str], *, what: str, instead: str = "") -> None:
    """Refuse parameters that grafts on the model change.

    Args:
        model: the model.
        names: the parameters that are to be trained.
        what: what is asked of them, e.g. "a mask over".
        instead: what else would do.

    Raises:
        RequestError: a graft changes one of them.
    """
    below = min(set(Stack.of(model).ledgers) & set(names), default=None)
    if below is not None:
        raise RequestError(
            f"{what} {below}, which carries a graft",
            expected="a plain base",
            do="merge the grafts into a base of their own first" + (f", or {instead}" if instead else ""),
        )
