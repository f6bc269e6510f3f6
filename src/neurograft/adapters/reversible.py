"""Full training without stored activations: the layers run as reversible blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from neurograft.adapters._operations import Held
from neurograft.adapters.dense import DenseMount
from neurograft.core.card import method
from neurograft.core.compact.mount import Mount, regions_of
from neurograft.core.compact.values import register_values, unregister_values
from neurograft.core.errors import one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.operation import Operation
from neurograft.core.selection import Selection
from neurograft.networks._coupling import Tape
from neurograft.networks.reversible import FORMS, Reversible, Reversing, halves


@method(
    paper="revffn",
    claims={"undo"},
    departs="Not function-preserving, so the graft holds the blocks' projections too. The standard form, whose inverse "
    "is one exact step at any scale, is the default; the paper's coupled one is not always invertible, and where its "
    "inverse misses, which a forward pass checks, the input is stored. Projections start as copy and mean of halves.",
)
def reversible(
    model: nn.Module,
    where: Selection | None = None,
    *,
    new: Iterable[str] | Mapping[str, int] = (),
    protect: Selection | None = None,
    form: Literal["standard", "coupled"] = "standard",
    verify: int | None = None,
    tolerance: float | None = None,
    iterations: int = 100,
) -> Mount:
    """Train whole parameters of a decoder whose layers keep no activations: they are computed back from the output.

    Y1 = X1 + P_down Attn(LN(P_up X2)), Y2 = X2 + P_down FFN(LN(P_up Y1)) on the halves [X1, X2] of the hidden state,
    with the layer's own norms, attention and FFN (dense or experts); in the coupled form queries come from X1. The
    halves stay float32 between layers, dropout is drawn again as it was, experts are chosen again as they were, and a
    router's own loss has its gradient.

    Args:
        model: a decoder of transformers: Llama-, Qwen-, Mixtral- or GPT-2-like.
        where: units that own whole parameters; None for everything. The projections are always trained.
        new: parameters the base's checkpoint lacks.
        protect: units whose parameters stay frozen, whole.
        form: "standard" or "coupled".
        verify: recover every n-th forward pass's inputs at once and store what is missed; 0 for never. 1 for the
            coupled form and 0 for the standard one if None.
        tolerance: of that check, relative; 1e-4 in float32 and 1e-9 in float64 if None.
        iterations: of the coupled form's fixed point, at most.

    Raises:
        RequestError: layers that are not known, a coupled form with fused q, k, v, a part of a parameter selected.
    """
    one_of(form, FORMS, what="form")
    names = [n for n, p in model.named_parameters() if p.is_floating_point()]
    if where is not None:
        names = list(regions_of(model, where, tied="both"))
    if protect is not None:
        shielded = regions_of(model, protect, tied="both")
        names = [n for n in names if n not in shielded]
    exact = next(model.parameters()).dtype == torch.float64
    check = (1 if form == "coupled" else 0) if verify is None else verify
    close = (1e-9 if exact else 1e-4) if tolerance is None else tolerance
    mount = ReversibleMount(model, names, Tape(form, check, close, iterations), new=new)
    mount.declared = where is not None
    return mount


class ReversibleMount(DenseMount):
    """Parameters set free in a decoder of reversible blocks."""

    def __init__(
        self, model: nn.Module, names: list[str], tape: Tape, *, new: Iterable[str] | Mapping[str, int] = ()
    ) -> None:
        self.halves, self.tape = [Held(n, value) for n, value in halves(model).items()], tape
        super().__init__(model, names, new=new)
        self.reversing = Reversing(model, {h.name: h.theta for h in self.halves}, tape)
        register_values(model, self.halves)

    def undo(self) -> None:
        """Take back what an attachment did that failed half way."""
        if hasattr(self, "reversing"):
            self.reversing.remove()
        unregister_values(self.model)
        super().undo()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters set free and the projections."""
        return {**super().trained(), **{h.name: h.theta for h in self.halves}}

    def operations(self) -> tuple[Operation, ...]:
        """Return the blocks."""
        return (Reversible(self.tape.form, {h.name: h.theta.detach().cpu().clone() for h in self.halves}),)

    def graft(self, *, card: Mapping[str, Any] | None = None) -> Graft:
        """Return what has been trained so far; the card says how often an input had to be stored."""
        told = {"form": self.tape.form, "passes": self.tape.passes, "stored": self.tape.stored}
        return super().graft(card={**(card or {}), "reversible": told})

    def rest(self) -> Callable[[], None]:
        """Put the base back for a moment, its layers too."""
        if not self.attached:
            return lambda: None
        ended = super().rest()
        self.reversing.remove()

        def over() -> None:
            self.reversing.put()
            ended()

        return over

    def unmount(self) -> None:
        """Put the originals and the layers back."""
        super().unmount()
        self.reversing.remove()
        unregister_values(self.model)
