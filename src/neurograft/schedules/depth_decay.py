"""Learning rates that fall with depth: the lower a layer, the slower it moves."""

from __future__ import annotations

from collections.abc import Sequence

from neurograft.anatomy.depth import Depths
from neurograft.core.card import method
from neurograft.core.context import Phase
from neurograft.core.errors import RequestError, one_of

CONVENTIONS = {"electra": 2, "few_sample": 1}  # what is added to the number of layers in the exponent


@method(
    paper="biomed-stability",
    departs="Which of the two conventions the paper used could not be read; the default is that of the code of the "
    "model it names.",
)
def depth_decay(
    step: int, names: Sequence[str], *, depth: Depths, decay: float = 0.8, convention: str = "electra"
) -> Phase:
    """Multiply the learning rate by decay^(L + 2 - depth) ("electra") or decay^(L + 1 - depth) ("few_sample").

    Embeddings have depth 0, layers 1 to L, and what lies behind (pooler, final norm, head) moves at the full rate. In
    "electra" the top layer already has decay^2, in "few_sample" decay^1.

    Args:
        step: optimizer steps made so far.
        names: names of the trainable tensors.
        depth: of the model's parameters; the training loop gives it.
        decay: 0.8 for small and base models and 0.9 for large ones; 0.95 goes with "few_sample". 1 changes nothing.
        convention: one of the two.

    Raises:
        RequestError: an unknown convention, or a decay outside of (0, 1].

    Example:
        >>> deep = Depths({"emb": 0, "l.0": 1, "l.1": 2, "head": 3}, 2)
        >>> list(depth_decay(0, ["emb", "l.0", "l.1", "head"], depth=deep, decay=0.5).lr.values())
        [0.0625, 0.125, 0.25, 1.0]
    """
    extra = CONVENTIONS[one_of(convention, CONVENTIONS, what="convention")]
    if not 0 < decay <= 1:
        raise RequestError(f"a decay of {decay}", expected="above 0 and at most 1", do="give 0.8, or 1 for none")
    rates = {}
    for name in names:
        deep = depth.of(name)
        rates[name] = 1.0 if deep > depth.layers else decay ** (depth.layers + extra - deep)
    return Phase(lr=rates, stage=f"decay {decay}")
