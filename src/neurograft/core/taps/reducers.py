"""Statistics of units that take activations batch by batch: memory grows with the units, never with the data.

Every reducer takes activations [tokens, n]; however the data are cut into batches, it gives the same. Sums are kept in
float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.seeds import generator


class Reducer(ABC):
    """A statistic of n units.

    Args:
        n: how many units.
    """

    def __init__(self, n: int) -> None:
        self.n, self.count = n, 0

    def update(self, x: Tensor, places: Tensor | None = None) -> None:
        """Take in activations, float [tokens, n]; `places` int64 [tokens, 2] says where they stand, for exemplars."""
        if len(x):
            self._take(x if x.dtype in (torch.float32, torch.float64) else x.float(), places)
            self.count += len(x)

    @abstractmethod
    def _take(self, x: Tensor, places: Tensor | None) -> None: ...


class Moments(Reducer):
    """Count, mean and variance, by Chan's joining of batch means and squared deviations.

    Example:
        >>> m = Moments(1)
        >>> m.update(torch.tensor([[1.0], [2.0]])); m.update(torch.tensor([[6.0]]))
        >>> m.mean.tolist(), m.variance.tolist()
        ([3.0], [4.666666666666667])
    """

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.mean = torch.zeros(n, dtype=torch.float64)
        self.squares = torch.zeros(n, dtype=torch.float64)

    def _take(self, x: Tensor, places: Tensor | None) -> None:
        mean, count = x.mean(0), len(x)
        total, step = self.count + count, mean.double().cpu() - self.mean
        self.mean = self.mean + step * (count / total)
        squares = (x - mean).square_().sum(0).double().cpu()
        self.squares = self.squares + squares + step.square() * (self.count * count / total)

    @property
    def variance(self) -> Tensor:
        """Mean squared deviation from the mean, float64 [n]."""
        return self.squares / max(1, self.count)


class Sums(Reducer):
    """Signed, absolute and squared sums, float64 [n] each."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.signed, self.absolute, self.squared = (torch.zeros(n, dtype=torch.float64) for _ in range(3))

    def _take(self, x: Tensor, places: Tensor | None) -> None:
        self.signed += x.sum(0).double().cpu()
        self.absolute += x.abs().sum(0).double().cpu()
        self.squared += x.square().sum(0).double().cpu()


class Rate(Reducer):
    """Share of activations above a bar: the firing rate.

    Args:
        n: how many units.
        above: the bar.
    """

    def __init__(self, n: int, *, above: float = 0.0) -> None:
        super().__init__(n)
        self.above, self.fired = above, torch.zeros(n, dtype=torch.float64)

    def _take(self, x: Tensor, places: Tensor | None) -> None:
        # Comparing straight into floats is many times faster on a CPU than summing booleans.
        self.fired += torch.gt(x, self.above, out=torch.empty_like(x)).sum(0).double().cpu()

    @property
    def rate(self) -> Tensor:
        """Share of activations above the bar, float64 [n]; 0 where none was seen."""
        return self.fired / max(1, self.count)


class Extremes(Reducer):
    """Largest and smallest activation; 0 where none was seen."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.high, self.low = torch.zeros(n), torch.zeros(n)

    def _take(self, x: Tensor, places: Tensor | None) -> None:
        high, low = x.amax(0).float().cpu(), x.amin(0).float().cpu()
        self.high = torch.maximum(self.high, high) if self.count else high
        self.low = torch.minimum(self.low, low) if self.count else low

    @property
    def absolute(self) -> Tensor:
        """Largest absolute activation, float32 [n]."""
        return torch.maximum(self.high, -self.low)


class Sample(Reducer):
    """A uniform sample of tokens, all units of the same ones, for quantiles.

    Exact while at most `size` tokens were seen; afterwards the rank of a quantile q is off by about
    sqrt(q (1 - q) / size). Every token gets a random key and the smallest keys stay.

    Args:
        n: how many units.
        size: tokens kept; memory is size * n floats.
        seed: names the keys.
    """

    def __init__(self, n: int, *, size: int = 1024, seed: int = 0) -> None:
        super().__init__(n)
        self.size, self.random = size, generator(seed, "sample")
        self.keys, self.rows = torch.empty(0, dtype=torch.float64), torch.empty(0, n)

    def _take(self, x: Tensor, places: Tensor | None) -> None:
        keys = torch.rand(len(x), generator=self.random, dtype=torch.float64)
        if len(self.keys) == self.size:
            near = (keys < self.keys.max()).nonzero()[:, 0]
            if not len(near):
                return
            keys, x = keys[near], x[near.to(x.device)]
        all_keys, all_rows = torch.cat([self.keys, keys]), torch.cat([self.rows, x.float().cpu()])
        if len(all_keys) > self.size:
            kept = all_keys.topk(self.size, largest=False, sorted=False).indices
            all_keys, all_rows = all_keys[kept], all_rows[kept]
        self.keys, self.rows = all_keys, all_rows

    def quantile(self, q: float) -> Tensor:
        """Return the q-quantile of each unit, float32 [n]; 0 where nothing was seen."""
        if not len(self.rows):
            return torch.zeros(self.n)
        return torch.quantile(self.rows, q, dim=0)


class Exemplars(Reducer):
    """The k highest activations of each unit and where they stood; of equal ones the earliest.

    Args:
        n: how many units.
        k: how many to keep.
    """

    def __init__(self, n: int, *, k: int = 10) -> None:
        super().__init__(n)
        self.k = k
        self.values, self.places = torch.full((k, n), -torch.inf), torch.full((k, n, 2), -1)

    def _take(self, x: Tensor, places: Tensor | None) -> None:
        if places is None:
            raise RequestError("activations without places", expected="int64 [tokens, 2]", do="pass places")
        bar = self.values[-1].to(x.device)
        better = (x.amax(0) > bar).nonzero()[:, 0]
        if not len(better):
            return
        here = x[:, better]
        values, at = here.topk(min(self.k + 1, len(x)), dim=0)  # one more, to see whether it would do as well
        equal = (values[1:] == values[:-1]).any(0)
        if bool(equal.any()):  # topk takes any of them
            at[:, equal] = here[:, equal].sort(dim=0, descending=True, stable=True).indices[: len(at)]
        self._join(values[: self.k].float().cpu(), places.cpu()[at[: self.k].cpu()], better.cpu())

    def _join(self, values: Tensor, places: Tensor, units: Tensor) -> None:
        # Stable, so that of equal activations the earliest stays.
        both = torch.cat([self.values[:, units], values])
        order = both.sort(dim=0, descending=True, stable=True).indices[: self.k]
        where = torch.cat([self.places[:, units], places])
        self.values[:, units] = both.gather(0, order)
        self.places[:, units] = where.gather(0, order[..., None].expand(-1, -1, 2))
