"""Changes as a log: seeds and scalars that, replayed on the base, make the trained numbers again, to the byte."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError, RunError
from neurograft.core.fingerprint import Digested, tensor_digest
from neurograft.core.grafts.slices import Entries, Slice
from neurograft.core.numerics.noise import Stream, device_kind


@dataclass(frozen=True, eq=False)
class Log:
    """What a zeroth-order training did: theta <- keep * theta - sum over n of rate * pull[n] * z(seed[n]).

    Args:
        seeds: int64 [T, n].
        pulls: float64 [T, n].
        rates: float64 [T or 1, K], the learning rate of each of K tracks; one row if it never changed.
        keeps: float64 [T or 1, K], what weight decay leaves of a number.
        grain: numbers drawn at a time.
        made: {"torch": version, "device": kind}: where it replays to the same bytes.
    """

    seeds: Tensor
    pulls: Tensor
    rates: Tensor
    keeps: Tensor
    grain: int
    made: dict[str, str]

    NAMES = ("seeds", "pulls", "rates", "keeps")

    def step(self, t: int, track: int) -> tuple[list[tuple[int, float]], float]:
        """Return the terms of a step and what it keeps."""
        rate, keep = (float(v[min(t, len(v) - 1), track]) for v in (self.rates, self.keeps))
        pulls = self.pulls[t].tolist()
        return [(s, -rate * p) for s, p in zip(self.seeds[t].tolist(), pulls)] if rate else [], keep

    def __len__(self) -> int:
        return len(self.seeds)


class Home:
    """Where a log was made, held weakly: the model, at rest for as long as its base is read.

    Args:
        model: the model.
        rest: of a mount: puts the base's numbers back and returns what ends that.
    """

    def __init__(self, model: nn.Module, rest: Callable[[], Callable[[], None]] | None = None) -> None:
        self.model = weakref.ref(model)
        self.rest = None if rest is None else weakref.WeakMethod(rest)

    @contextmanager
    def base(self) -> Iterator[nn.Module | None]:
        """Give the base, or None if the model is gone."""
        rest = None if self.rest is None else self.rest()
        ended = None if rest is None else rest()
        try:
            yield self.model()
        finally:
            if ended is not None:
                ended()


@dataclass(frozen=True, eq=False)
class Replay(Entries):
    """The change that a log makes to the entries of a region.

    Args:
        region: which entries; the log moves their values in the region's order.
        stream: name of their noise.
        held: dtype in which the numbers are held between the steps.
        log: what happened.
        track: which of the log's rates holds here.
        result: digest of the values it ends at; a replay that ends elsewhere raises.
    """

    stream: str
    held: torch.dtype
    log: Log
    track: int
    result: str

    def tensors(self) -> dict[str, Any]:
        """Return what a slice with the values it ends at would, the values as their digest: it is the same change."""
        return {"value": Digested(self.result), **self.places()}

    def on(self, base: Tensor) -> Slice:
        """Return the change as a slice, given the base's tensor; see `replayed`."""
        return self.replayed(self.region.read(base))

    def replayed(self, numbers: Tensor) -> Slice:
        """Replay on the base's numbers of the region, and return the values.

        Raises:
            RequestError: this torch or this device would make other bytes.
            RunError: other bytes came out although both are the same.
        """
        device = self._device()
        flat = numbers.detach().to(device, self.held, copy=True).reshape(-1)
        stream = Stream(self.stream, self.region.values_shape, self.log.grain)
        for t in range(len(self.log)):
            terms, keep = self.log.step(t, self.track)
            if terms or keep != 1.0:
                stream.advance_(flat, terms, keep=keep)
        wide = flat.cpu() if self.held == torch.float64 else flat.cpu().float()
        values = wide.reshape(self.region.values_shape)
        if tensor_digest(values) != self.result:
            raise RunError(
                f"the log of {self.stream} replayed to other bytes than its training made; use the portable form "
                "(graft.materialize, graft.save) from where it was trained"
            )
        return Slice(self.region, values)

    def _device(self) -> torch.device:
        device = torch.device(self.log.made["device"].partition(" ")[0])
        here = torch.cuda.is_available() if device.type == "cuda" else device.type == "cpu"
        found = {"torch": torch.__version__, "device": device_kind(device) if here else "cpu only"}
        for what, came in found.items():
            if came != self.log.made[what]:
                raise RequestError(
                    f"a log of seeds made with {what} {self.log.made[what]!r}, here {came!r}",
                    expected="the same torch version and kind of device, on which the same noise is drawn",
                    do="replay it where it was made, and ship graft.materialize() (what graft.save writes)",
                )
        return device
