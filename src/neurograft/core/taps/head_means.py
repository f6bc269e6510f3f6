"""What attention heads do on average, by how far before the end of the prompt.

Shape letters: B rows, T tokens, n heads, w features of a head, D distances from the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurograft.core.batches import Batch, token_mask
from neurograft.core.errors import RequestError
from neurograft.core.prompts.places import ends
from neurograft.core.taps.capture import capture
from neurograft.core.units import Site


@dataclass(frozen=True)
class Means:
    """What heads do on average, by how far before the end of the prompt.

    Args:
        values: site name -> float32 [D, n, w], row 0 at the end.
    """

    values: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module, sites: Mapping[str, Site], batches: Sequence[Batch]) -> Means:
        """Measure them on reference prompts, such as other scenes with queries that nothing answers.

        Raises:
            RequestError: no batches.
        """
        if not batches:
            raise RequestError("no reference prompts", expected="data to take means over", do="give corrupt prompts")
        places = [_before_the_end(b) for b in batches]
        longest = max(int(far.max()) + 1 for far in places)
        count = torch.zeros(longest, dtype=torch.float64)
        total: dict[str, Tensor] = {}
        for batch, far in zip(batches, places):
            inside = far >= 0
            count.index_add_(0, far[inside], torch.ones(int(inside.sum()), dtype=torch.float64))
            for name, x in capture(model, sites, batch).items():
                here = x[inside].double()
                total.setdefault(name, torch.zeros(longest, *here.shape[1:], dtype=torch.float64))
                total[name].index_add_(0, far[inside], here)
        shape = {name: (longest, *[1] * (t.dim() - 1)) for name, t in total.items()}
        return Means({name: (t / count.reshape(shape[name])).float() for name, t in total.items()})

    def at(self, name: str, batch: Batch) -> Tensor:
        """Return the means at a batch's tokens, [B, T, n, w]; behind the end and at padding those at the end.

        Raises:
            RequestError: a prompt longer than every reference prompt.
        """
        far = _before_the_end(batch).clamp(min=0)
        if int(far.max()) >= len(self.values[name]):
            raise RequestError(
                f"a prompt of {int(far.max()) + 1} tokens",
                expected=f"at most the {len(self.values[name])} of the reference prompts",
                do="give reference prompts of the same lengths",
            )
        return self.values[name][far]


def _before_the_end(batch: Batch) -> Tensor:
    """Return how far before the end of its prompt each token stands, int64 [B, T]; below 0 behind it and at padding."""
    far = ends(batch).cpu()[:, None] - torch.arange(batch["input_ids"].shape[1])
    real = token_mask({k: v for k, v in batch.items() if v is not None})
    assert real is not None
    return far.masked_fill(~real.cpu(), -1)
