"""Sums of grafts: one graft's contents that do what those of two do."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.grafts.combined import merged
from neurograft.core.grafts.contents import Contents
from neurograft.core.grafts.delta import Delta, LowRank, New, Shut, Slice
from neurograft.core.region import positions, union


def refuse_strangers(one: Contents, other: Contents) -> None:
    """Raise unless two grafts have one base and no operations whose order would matter.

    Raises:
        RequestError: they do not.
    """
    clash = [n for n in one.base.keys() & other.base.keys() if one.base[n] != other.base[n]]
    if clash:
        raise RequestError(
            f"grafts of different bases (tensor {clash[0]!r})",
            expected="grafts of one base",
            do="make both on the same base and revision",
        )
    for mine in one.operations:
        for theirs in other.operations:
            if mine.clashes(theirs):
                raise RequestError(
                    f"the sum of {mine.describe()} and {theirs.describe()}",
                    expected="operations on different activations",
                    do="keep one of them",
                )


def summed(one: Contents, other: Contents) -> tuple[dict[str, Delta], dict[str, Tensor]]:
    """Return the sums of two grafts' changes by tensor, and the base's numbers under them as far as they are known.

    Raises:
        RequestError: they overlap where the base's numbers are not known, or have no sum.
    """
    deltas: dict[str, Delta] = {}
    originals: dict[str, Tensor] = {}
    for name in sorted(one.deltas.keys() | other.deltas.keys()):
        deltas[name], original = _sum(name, [g for g in (one, other) if name in g.deltas])
        if original is not None:
            originals[name] = original
    return deltas, originals


def _sum(name: str, grafts: list[Contents]) -> tuple[Delta, Tensor | None]:
    """Return one delta for a tensor that one or two grafts change, and the base's numbers under it if known."""
    first = grafts[0]
    if len(grafts) == 1 and first.strength == 1.0:
        return first.deltas[name], first.originals.get(name)
    lows = [g.deltas[name] for g in grafts]
    if all(isinstance(d, LowRank) for d in lows):
        return _stacked([(d, g.strength) for d, g in zip(lows, grafts) if isinstance(d, LowRank)]), None
    slices = []
    for graft in grafts:
        delta = graft.deltas[name]
        if isinstance(delta, New):
            raise RequestError(
                f"two grafts that both bring {name!r}",
                expected="one of them",
                do="keep only one graft with this new parameter",
            )
        if name not in graft.originals and not isinstance(delta, Slice):
            raise _unbound(name)
        whole = delta if isinstance(delta, Slice) else delta.on(graft.originals[name].reshape(delta.shape))
        slices.append((whole, graft.strength))
    overlap = len(slices) == 2 and union(s.region for s, _ in slices).numel < sum(s.region.numel for s, _ in slices)
    shut = all(isinstance(change, Shut) for change, _ in slices)
    if (shut or not overlap) and all(s == 1.0 for _, s in slices):
        return merged(slices, None), _originals(name, grafts, slices)
    original = _originals(name, grafts, slices)
    if original is None:
        raise _unbound(name)
    ordered = [s for _, s in sorted(zip([g.identity for g in grafts], slices), key=lambda pair: pair[0])]
    return merged(ordered, original), original


def _stacked(changes: list[tuple[LowRank, float]]) -> LowRank:
    """Return low-rank changes of one tensor as one, with the ranks side by side."""
    first = changes[0][0]
    A = torch.cat([low.A if low.transposed == first.transposed else low.B.t() for low, _ in changes])
    B = [low.B if low.transposed == first.transposed else low.A.t() for low, _ in changes]
    scaled = [b * (low.scale * s) for b, (low, s) in zip(B, changes)]
    return LowRank(first.shape, A, torch.cat(scaled, 1), 1.0, first.transposed)


def _originals(name: str, grafts: list[Contents], slices: list[tuple[Slice, float]]) -> Tensor | None:
    if any(name not in g.originals for g in grafts):
        return None
    region = union(s.region for s, _ in slices)
    known = [(Slice(s.region, g.originals[name]), 1.0) for (s, _), g in zip(slices, grafts)]
    # Both grafts read the same base, so wherever they overlap either one's original will do.
    found = torch.zeros(region.values_shape, dtype=grafts[0].originals[name].dtype).reshape(-1)
    for part, _ in known:
        found[positions(part.region, region)] = part.values.reshape(-1).cpu()
    return found.reshape(region.values_shape)


def _unbound(name: str) -> RequestError:
    return RequestError(
        f"a sum or scale that needs the base's numbers of {name!r}",
        expected="grafts that know them",
        do="bind them first: graft.bind(model)",
    )
