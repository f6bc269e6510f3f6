"""Activations that follow another model: at each pass the other one is run on the same input first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, RunError
from neurograft.core.intervene import Intervention, Mounted
from neurograft.core.prompts.passing import Seen
from neurograft.core.taps.capture import capture
from neurograft.core.units import Site
from neurograft.pipeline.state import as_found

CACHE = ("past_key_values", "use_cache", "cache_position")


class Follow:
    """Replaces activations by what another model has at the same place on the same input.

    Args:
        source: the other model.
        sites: where.
        ids: site name -> units.
        how: positions and rows, as for `Intervention`.
    """

    def __init__(
        self, source: nn.Module, sites: Mapping[str, Site], ids: Mapping[str, Tensor], how: Mapping[str, Any]
    ) -> None:
        self.source, self.sites, self.ids, self.how = source, sites, ids, how
        self.steps: dict[str, Intervention] = {}

    def mount(self, model: nn.Module) -> list[Any]:
        """Put it on; returns what takes it off, the last first.

        Raises:
            RequestError: the model is its own source.
        """
        if self.source is model:
            raise RequestError("a model as its own source", expected="another model", do="give data for its own mean")
        mounted: list[Any] = [
            _Hook(model.register_forward_pre_hook(self._run, with_kwargs=True)),
            _Hook(model.register_forward_hook(self._done, always_call=True)),
        ]
        for name, site in self.sites.items():
            wide = site.tap.width if site.tap is not None else 1
            nothing = torch.zeros(len(self.ids[name]), *[wide] * (wide > 1))
            seat = Intervention(site, self.ids[name], "replace", nothing, **self.how).mount(model)
            seat.guest.visit = self._visit
            mounted.append(seat)
        return mounted

    def _visit(self, name: str, x: Tensor, seen: Seen) -> Tensor | None:
        if not self.steps:
            raise RunError("a module was called alone while its activations follow another model; call the whole model")
        return self.steps[name].visit(name, x, seen)

    def _run(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache: Any = kwargs.get("past_key_values")
        if args or (hasattr(cache, "get_seq_length") and cache.get_seq_length()):
            raise RunError("activations can follow another model only for whole inputs given by name; use_cache=False")
        inputs = {k: v for k, v in kwargs.items() if k not in CACHE}
        with as_found(self.source):
            found = capture(self.source, self.sites, inputs)
        for name, value in found.items():
            ids = self.ids[name]
            self.steps[name] = Intervention(self.sites[name], ids, "replace", value.index_select(2, ids), **self.how)

    def _done(self, model: nn.Module, args: Any, output: Any) -> None:
        self.steps = {}  # another pass, or a module called alone, has nothing to follow yet


class _Hook:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def remove(self) -> None:
        self.handle.remove()


def fired(mounted: Any) -> bool:
    """Say whether something mounted did its work, or rightly had none."""
    if not isinstance(mounted, Mounted) or mounted.fired:
        return True
    return all(s.tap is not None and s.tap.expert is not None for s in mounted.guest.sites.values())
