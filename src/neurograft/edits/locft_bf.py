"""LocFT-BF: fine-tuning as an editor: one matrix, all edits shuffled together, and the place found by trying."""

from __future__ import annotations

from collections.abc import Sequence

from neurograft.core.card import method
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, one_of
from neurograft.core.grafts.graft import Graft
from neurograft.core.ranges import least
from neurograft.core.selection import Selection
from neurograft.edits._places import MATRICES, places
from neurograft.edits._separate import Separate
from neurograft.edits._training import Training

ORDERS = ("breadth", "depth")


@method(
    paper="locft-bf",
    needs={"requests", "gradients"},
    departs="One matrix of an FFN is trained, never a whole layer (the paper's choice for Mistral). The sweep tries "
    "every layer and matrix on some of the requests and multiplies the share that is learned with the share of general "
    "predictions that stay; the paper names no formula. The order 'depth' starts a new Adam for every edit, as editing "
    "one at a time does. separate=True, with which single edits come off again, is ours: it trains a sum of parts in "
    "the span of each request's own keys instead of the matrix.",
)
def locft_bf(
    context: Context,
    where: Selection | None = None,
    *,
    order: str = "breadth",
    layers: Sequence[int] | None = None,
    matrix: str = "down",
    sweep: int = 0,
    lr: float = 5e-4,
    epochs: int = 25,
    together: int = 64,
    enough: float = 1e-2,
    eos: bool = True,
    separate: bool = False,
) -> Graft:
    """Train one matrix on the targets alone: their cross-entropy, averaged over each target, then over the batch.

    Args:
        context: model, requests, named generators; batches of general data for the sweep.
        where: must be None; the place is a whole matrix.
        order: "breadth" shuffles all requests into batches, epoch after epoch; "depth" brings one after another to
            its end.
        layers: the one layer to train, or the layers to sweep; a late one (22 of 32) if None.
        matrix: "down", "up" or "gate" of its FFN; a sweep tries all that are there.
        sweep: how many requests to try every place with; 0 for no sweep.
        lr: of Adam.
        epochs: at most so many passes over the requests.
        together: requests in a batch.
        enough: a batch whose loss lies below this makes no step; the mean of an epoch below it is the end.
        eos: append the token that ends an answer to every target.
        separate: give every request ranks of its own, so that `rollback` can take it out alone; the matrix is changed
            for what enters it where the answers are predicted, and moves less freely: see `_separate`. Edits of a
            crowded matrix lean on each other: of 100 facts in 4,608 numbers .91 were said (whole: .97) and taking one
            out cost .15 of the others; of 10 or 20 facts it cost .02.

    Returns:
        The whole matrix's new values; with `separate` a low-rank change, ranks one request after another.

    Raises:
        RequestError: no requests, a selection, more than one layer without a sweep.
    """
    one_of(order, ORDERS, what="order")
    one_of(matrix, MATRICES, what="matrix")
    least(sweep=(sweep, 0), lr=(lr, 0), epochs=(epochs, 1), together=(together, 1), enough=(enough, 0))
    if not context.requests:
        raise RequestError("an edit without requests", expected="at least one request", do="give prompt, target_new")
    if where is not None:
        raise RequestError("where= for locft_bf", expected="a layer and a matrix", do="pass layers=[i], matrix=...")
    if eos and any(r.end is None for r in context.requests):
        raise RequestError(
            "a model and tokenizer without a token that ends an answer", expected="one", do="pass eos=False"
        )
    tries = _tries(context, layers, None if sweep else matrix)
    train = (Separate if separate else Training)(context, order, lr, epochs, together, enough, eos)
    table: dict[str, float] = {}
    if sweep:
        table = {f"{layer}.{name}": train.tried(w, context.requests[:sweep]) for (layer, name), w in tries.items()}
        best = max(tries, key=lambda at: table[f"{at[0]}.{at[1]}"])
    elif layers is None:
        known = sorted(tries)
        best = known[int(len(known) * 22 / 32)]
    elif len(tries) == 1:
        best = next(iter(tries))
    else:
        raise RequestError(f"layers={list(layers)} for one matrix", expected="one layer", do="name one, or pass sweep=")
    with train.at(tries[best]) as weight:
        losses = train.fit(weight, context.requests)
        deltas = train.deltas(tries[best])
    card = {"place": list(best), "sweep": table, "losses": losses}
    if isinstance(train, Separate):
        card["ranks"] = train.ranks(context.requests)
    return Graft.made(context.model, deltas, card=card)


def _tries(context: Context, layers: Sequence[int] | None, matrix: str | None) -> dict[tuple[int, str], str]:
    """Return the places that may be trained."""
    known = places(context.model)
    found = {
        at: weight for at, weight in known.items() if (layers is None or at[0] in layers) and matrix in (None, at[1])
    }
    missing = [layer for layer in layers or () if layer not in {at for at, _ in found}]
    if missing or not found:
        raise RequestError(
            f"layer {missing[0]}" if missing else f"matrix={matrix!r}",
            expected=", ".join(f"{layer}.{name}" for layer, name in known) or "a model with FFNs",
            do="name a layer and a matrix that its FFN has",
        )
    return found
