"""A pull back to the base: the mean size of the change."""

from __future__ import annotations

import torch
from torch import Tensor

from neurograft.core.card import method
from neurograft.core.context import Step
from neurograft.core.errors import RequestError


@method(paper="composable-sft", claims={"penalty"})
def pull(step: Step) -> Tensor:
    """Return sum |theta - theta_0| over what is trained, divided by how many numbers the model has.

    An anchor: `anchor=("pull", {"weight": 0.1})`. It needs no data.

    Raises:
        RequestError: nothing is trained in the shape of the base's numbers (low rank, beside the weight).
    """
    trained = step.trained()
    if not trained:
        raise RequestError(
            "a pull on a change that is no set of the base's numbers",
            expected="adapter='slice' in place, or 'dense'",
            do="choose one of them, or leave the anchor out",
        )
    far = [(t.values - t.original.to(t.values)).abs().sum() for t in trained.values()]
    return torch.stack(far).sum() / sum(p.numel() for p in step.model.parameters())
