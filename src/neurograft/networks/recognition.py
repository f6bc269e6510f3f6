"""How reliably a dendritic segment recognises sparse codes: closed forms.

Letters, as in the paper: n cells, of which a are active in a code; s synapses of a segment, sampled from the stored
code's active cells; theta, how many of them must be active at once; nu, the chance that an active cell fails; M codes
stored on one segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.numerics.chance import at_least, binomial, hypergeometric


class Errors(NamedTuple):
    """What a threshold costs: the chances of a false positive and of a false negative."""

    theta: int
    false_positive: float
    false_negative: float


@method(paper="sdr-dendrites")
def recognition(
    n: int, a: int, s: int, *, theta: int | None = None, nu: float = 0.3, M: int = 1, segments: int = 1
) -> Errors:
    """Return the error rates of a neuron of `segments` segments with M codes on each, at theta or the best theta.

    Args:
        n: cells.
        a: active ones in a code.
        s: synapses for each stored code.
        theta: the threshold; None for the one with the least sum of both errors.
        nu: chance that an active cell of a stored code fails.
        M: codes stored on each segment.
        segments: of the neuron, which fires if one of them does.

    Raises:
        RequestError: numbers that do not fit each other.

    Example:
        >>> found = recognition(2000, 40, 20, nu=0.3)
        >>> found.theta, f"{found.false_positive:.2g}", f"{found.false_negative:.2g}"
        (5, '3.1e-05', '5.6e-06')
    """
    if not 0 < s <= a <= n or not 0 <= nu <= 1 or M < 1 or segments < 1:
        raise RequestError(
            f"n={n}, a={a}, s={s}, nu={nu}, M={M}, segments={segments}",
            expected="0 < s <= a <= n, 0 <= nu <= 1, at least one code and segment",
            do="give as many synapses as a code has active cells, or fewer",
        )
    if theta is not None and not 1 <= theta <= s:
        raise RequestError(f"theta={theta} with s={s}", expected=f"1 to {s}", do="lower the threshold")
    size = round(union_size(n, s, M))
    found = [
        Errors(t, any_of([false_positive(n, a, size, t)] * segments), false_negative(s, t, nu))
        for t in ([theta] if theta is not None else range(1, s + 1))
    ]
    return min(found, key=lambda e: e.false_positive + e.false_negative)


def false_positive(n: int, a: int, s: int, theta: int) -> float:
    """Return the chance that a random code of a active cells meets theta or more of s synapses.

    sum over b from theta of C(s, b) C(n - s, a - b) / C(n, a): the tail that also tells whether two selections of
    units share more than chance, `Selection.overlap`.

    Example:
        >>> f"{false_positive(2000, 40, 20, 10):.3g}"
        '4.94e-13'
    """
    return at_least(hypergeometric(n, s, a), theta)


def false_negative(s: int, theta: int, nu: float) -> float:
    """Return the chance that fewer than theta of s synapses work, if each fails with chance nu.

    Example:
        >>> round(false_negative(20, 10, 0.3), 4)
        0.0171
    """
    return min(1.0, math.fsum(binomial(s, 1 - nu)[:theta]))


def union_size(n: int, s: int, M: int) -> float:
    """Return how many distinct synapses M codes of s synapses each are expected to need: n (1 - (1 - s / n)^M).

    Example:
        >>> round(union_size(2000, 20, 10))
        191
    """
    return n * (1 - (1 - s / n) ** M)


def any_of(chances: Sequence[float]) -> float:
    """Return the chance that at least one of several independent events happens.

    Small chances keep their digits: 1 - (1 - p)(1 - q) is p + q - p q, event by event.

    Example:
        >>> any_of([0.5, 0.5]), any_of([1e-20, 1e-20])
        (0.75, 2e-20)
    """
    found = 0.0
    for chance in chances:
        found = found + chance - found * chance
    return found
