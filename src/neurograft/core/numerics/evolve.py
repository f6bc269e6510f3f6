"""Evolution of bit vectors for `core.numerics.search`, and a diverse few of what was found."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.numerics.search import Found, Propose


def evolution(*, top: int = 8, mutation: float = 0.05) -> Propose:
    """Return a proposer: a child of every ordered pair of the fittest, each bit from either parent, then mutated.

    A population that keeps its fittest and is larger than `top` breeds from the same ones as all that was seen.

    Args:
        top: how many breed; of different bits.
        mutation: chance that a bit flips.

    Raises:
        RequestError: fewer than two parents, or no chance between 0 and 1.

    Example:
        >>> from neurograft.core.numerics.search import search
        >>> rng = torch.Generator().manual_seed(0)
        >>> search(bits(8, 6, rng), lambda p: float(p.sum()), evolution(top=4), rounds=8, generator=rng).best.tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if top < 2 or not 0 <= mutation <= 1:
        raise RequestError(
            f"evolution of {top} parents with mutation={mutation}",
            expected="at least two parents, a chance between 0 and 1",
            do="top=8, mutation=0.05",
        )

    def propose(found: Found, generator: torch.Generator) -> Tensor:
        parents = found.points[found.ranked()[:top]]
        if len(parents) < 2:
            parents = parents.repeat(2, 1)
        n = len(parents)
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        one, other = (parents[[p[side] for p in pairs]] for side in (0, 1))
        child = torch.where(torch.rand(one.shape, generator=generator) < 0.5, one, other)
        return torch.where(torch.rand(one.shape, generator=generator) < mutation, 1 - child, child)

    return propose


def bits(count: int, wide: int, generator: torch.Generator) -> Tensor:
    """Return uniform random bit vectors, [count, wide], float64."""
    return torch.randint(2, (count, wide), generator=generator).double()


def diverse(found: Found, *, count: int = 3, apart: float = 0.0) -> Tensor:
    """Return the fittest candidates that lie apart from each other, the fittest first, [<= count, n].

    Args:
        found: what a search has seen.
        count: N, how many at most.
        apart: T, the least cosine distance 1 - a . b / (|a| |b|) of each two; 0 and any other vector lie 1 apart.

    Example:
        >>> points = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]]).double()
        >>> diverse(Found(points, torch.tensor([3.0, 2.0, 1.0])), count=2, apart=0.5).tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    kept: list[Tensor] = []
    for i in found.ranked().tolist():
        if len(kept) < count and all(distance(found.points[i], k) >= apart for k in kept):
            kept.append(found.points[i])
    return torch.stack(kept)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the cosine distance of two vectors; that of 0 is 0 to itself and 1 to any other."""
    norms = float(a.norm() * b.norm())
    return 1.0 - float(a @ b) / norms if norms else float(not torch.equal(a, b))
