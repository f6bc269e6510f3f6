"""Who is at a model's taps: one hook for each tapped tensor, however many watch or change it.

One board for each model, kept on the model as long as anybody is there. Guests that change a tensor come first, in the
order of their keys, so that the order of arriving and leaving never matters; guests that only read see what the model
goes on with.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, RunError, near
from neurograft.core.prompts.passing import TAPPED, Pass, Seen, recomputing
from neurograft.core.taps.bank import Bank
from neurograft.core.units import Site, Tap

ATTRIBUTE = TAPPED
Visit = Callable[[str, Tensor, Seen], Tensor | None]


@dataclass(eq=False)
class Guest:
    """Somebody at the taps of some sites.

    Args:
        sites: site name -> site with a tap.
        visit: (site name, activations [..., n] or [..., n, w], where they stand) -> what to go on with, or None.
        key: order among those that change, None for those that only read.
        again: whether it is also called when a checkpointed module is recomputed.
    """

    sites: Mapping[str, Site]
    visit: Visit
    key: str | None = None
    again: bool = False
    fired: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Port:
    """One tapped tensor, and its guests."""

    board: Board
    module: str
    side: str
    index: int
    decoder: bool
    guests: list[tuple[Guest, str, Site]] = field(default_factory=list)
    hook: Any = None

    def open(self, module: nn.Module) -> None:
        """Install the hook."""
        if self.side == "bank":
            self.hook = Bank(self.module, module, self._expert)
        elif self.side == "input":
            self.hook = module.register_forward_pre_hook(self._before, with_kwargs=True)
        else:
            self.hook = module.register_forward_hook(self._after)

    def add(self, guest: Guest, name: str, site: Site) -> None:
        """Seat a guest."""
        self.guests.append((guest, name, site))
        self.guests.sort(key=lambda g: (g[0].key is None, g[0].key or ""))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.index < len(args):
            new = self._shown(args[self.index], None, None)
            return None if new is None else ((*args[: self.index], new, *args[self.index + 1 :]), kwargs)
        name = list(inspect.signature(module.forward).parameters)[self.index]
        new = self._shown(kwargs[name], None, None)
        return None if new is None else (args, {**kwargs, name: new})

    def _after(self, module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return self._shown(out, None, None)
        if isinstance(out, Mapping):
            name = list(out)[self.index]
            new = self._shown(out[name], None, None)
            return None if new is None else type(out)(**{**out, name: new})
        new = self._shown(out[self.index], None, None)
        return None if new is None else type(out)([*out[: self.index], new, *out[self.index + 1 :]])

    def _expert(self, number: int, x: Tensor, tokens: Tensor) -> Tensor:
        new = self._shown(x, number, tokens)
        return x if new is None else new

    def _shown(self, x: Tensor, expert: int | None, tokens: Tensor | None) -> Tensor | None:
        """Show a tensor to the guests; returns what to go on with, or None if it is unchanged."""
        again, new = recomputing() != -1, None
        for guest, name, site in self.guests:
            tap = site.tap
            assert tap is not None
            if tap.expert != expert or (again and not guest.again):
                continue
            now = x if new is None else new
            units = take(now, tap, site.n, name)
            lead = tuple(units.shape[: units.dim() - (1 if tap.width == 1 else 2)])
            guest.fired[name] += 1
            seen = Seen(self.board.now, lead, tokens, self.decoder, self.board.model)
            made = guest.visit(name, units, seen)
            if made is not None:
                new = put(now, tap, site.n, made)
        return new


class Board:
    """The taps of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.now = model, Pass()
        self.ports: dict[tuple[str, str, int], Port] = {}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.decoder = _decoder(model, self.modules)
        self.hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        model.__dict__[ATTRIBUTE] = self

    @staticmethod
    def of(model: nn.Module) -> Board:
        """Return the model's board, a new one if it has none."""
        found: Board = model.__dict__.get(ATTRIBUTE) or Board(model)
        return found

    def join(self, guest: Guest) -> None:
        """Seat a guest at all its taps.

        Raises:
            RequestError: a site has no tap, or its module is not in this model.
        """
        try:
            for name, site in guest.sites.items():
                port = self._port(name, site)
                port.add(guest, name, site)
        except Exception:
            self.leave(guest)
            raise

    def leave(self, guest: Guest) -> None:
        """Let a guest go; the last one takes every hook along."""
        for key, port in list(self.ports.items()):
            port.guests = [g for g in port.guests if g[0] is not guest]
            if not port.guests:
                port.hook.remove()
                del self.ports[key]
        if not self.ports:
            for hook in self.hooks:
                hook.remove()
            self.model.__dict__.pop(ATTRIBUTE, None)

    def _port(self, name: str, site: Site) -> Port:
        tap = site.tap
        if tap is None:
            raise RequestError(
                f"the site {name!r}, whose units have no activations to tap",
                expected="units with a tap: neurons, heads, channels, layers",
                do="choose another kind of unit, or another `at`",
            )
        if tap.module not in self.modules:
            raise RequestError(
                f"the site {name!r}, tapped at the module {tap.module!r}",
                expected="a module of this model",
                do=f"make the sites on this model ({near(tap.module, self.modules)})",
            )
        side = tap.side if tap.expert is None else "bank"
        key = (tap.module, side, tap.index if side != "bank" else 0)
        if key not in self.ports:
            inside = self.decoder is not None and (tap.module + ".").startswith(self.decoder + ".")
            made = Port(self, *key, inside)
            made.open(self.modules[tap.module])
            self.ports[key] = made
        return self.ports[key]

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.now.begin(model, args, kwargs)

    def _end(self, model: nn.Module, args: Any, out: Any) -> None:
        self.now.end()


def take(x: Tensor, tap: Tap, n: int, name: str = "") -> Tensor:
    """Return the units' activations, [..., n] for units of one feature, else [..., n, width]; a view where it can be.

    Raises:
        RunError: the tensor has fewer features than the tap says.

    Example:
        >>> take(torch.arange(6.0).view(1, 6), Tap("m", start=2, width=2, stride=2), 2).tolist()
        [[[2.0, 3.0], [4.0, 5.0]]]
    """
    x = x if tap.dim == -1 else x.movedim(tap.dim, -1)
    if tap.start + (n - 1) * tap.stride + tap.width > x.shape[-1]:
        raise RunError(f"the tap of {name} reaches past the {x.shape[-1]} features that passed at {tap.module}")
    if tap.stride != tap.width and n > 1:
        found: Tensor = x[..., features(tap, n).to(x.device)]
        return found[..., 0] if tap.width == 1 else found
    found = x.narrow(-1, tap.start, n * tap.width)
    return found if tap.width == 1 else found.unflatten(-1, (n, tap.width))


def put(x: Tensor, tap: Tap, n: int, units: Tensor) -> Tensor:
    """Return `x` with the units' activations replaced; the rest keeps its bits and its gradient."""
    flat = units.to(x.dtype).reshape(*units.shape[: units.dim() - (1 if tap.width == 1 else 2)], n * tap.width)
    moved = x if tap.dim == -1 else x.movedim(tap.dim, -1)
    if n * tap.width == moved.shape[-1] and (tap.stride == tap.width or n == 1):
        made = flat
    else:
        made = moved.clone()
        made[..., features(tap, n).reshape(-1).to(x.device)] = flat
    return made if tap.dim == -1 else made.movedim(-1, tap.dim)


def features(tap: Tap, n: int) -> Tensor:
    """Return the feature numbers of each unit, int64 [n, width]."""
    return (tap.start + torch.arange(n) * tap.stride)[:, None] + torch.arange(tap.width)


def _decoder(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the name of an encoder-decoder's decoder, or None."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return None
    root: Any = model
    found = root.get_decoder()
    return next((name for name, module in modules.items() if module is found and name), None)
