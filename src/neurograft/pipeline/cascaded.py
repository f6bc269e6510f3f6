"""Steps of recipes for a cascade of LNets and an ANet: each trains one stage on a copy of the network.

The copy goes from step to step as `tuned`; `shipped` makes the graft. A share of the rows is held back from every
stage, and what is reported is measured on those.

Shape letters: N examples, P patches, F units, A attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits.unit_concepts import unit_concepts
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.seeds import derive, generator
from neurograft.core.units import Part, Site, Tap
from neurograft.networks.cascade import Cascade, cut
from neurograft.networks.identity_loss import identity_loss
from neurograft.pipeline._read_out import linear, read_out
from neurograft.pipeline.attach import attach
from neurograft.pipeline.diff import diff
from neurograft.pipeline.inputs import as_batches
from neurograft.pipeline.state import as_found
from neurograft.train.loop import fit

State = Mapping[str, Any]
CHUNK = 256


def localisers(state: State, *, steps: int, lr: float, batch: int, held: float) -> dict[str, Any]:
    """Train every LNet on the tags of whole images: the first on the images, the next on what the last one cuts out.

    Args:
        state: what the recipe has made so far, its model and data.
        steps: optimizer steps of each.
        lr: learning rate, linear to 0 after a short warm-up.
        batch: images in a step.
        held: share of the rows held back.

    Raises:
        RequestError: the model is no `Cascade`, or rows without pixels or tags that fit it.
    """
    net = _copy(state)
    rows = _rows(state, net, held)[0]
    shown = rows["pixel_values"]
    for level, lnet in enumerate(net.lnets):
        trained(
            lnet,
            {"pixel_values": shown, "labels": rows["labels"]},
            lambda model, b: model(**b).loss,
            steps=steps, lr=lr, batch=batch, seed=_seed(state, "localiser", level),
        )  # fmt: skip
        shown = _chunked(lambda x, level=level: cut(x, net.where(x, level), net.windows[level]), shown)
    return {"tuned": net}


def identified(
    state: State,
    *,
    pull: float,
    towards: str,
    steps: int,
    lr: float,
    batch: int,
    held: float,
    data: Any = None,
) -> dict[str, Any]:
    """Train the ANet to tell identities by patches, with features of one identity pulled together.

    Args:
        state: as above.
        pull: weight of the pull; see `networks.identity_loss`.
        towards: "mean" or "pairs".
        steps: optimizer steps.
        lr: learning rate.
        batch: patches in a step, one of each image drawn.
        held: share of the rows held back.
        data: rows with `pixel_values` and `identity`, instead of the run's.

    Raises:
        RequestError: rows without identities.
    """
    net = _copy(state)
    rows = _rows(state if data is None else {**state, "data": data}, net, held, need=("identity",))[0]
    patches = _chunked(net.patches, rows["pixel_values"])

    def loss(model: nn.Module, b: Batch) -> Tensor:
        made = model(b["pixel_values"])
        return identity_loss(made.identities[:, 0], made.features[:, 0], b["identity"], pull=pull, towards=towards)

    trained(
        net.anet, {"pixel_values": patches, "identity": rows["identity"]}, loss,
        steps=steps, lr=lr, batch=batch, seed=_seed(state, "identified"),
    )  # fmt: skip
    return {"tuned": net, "pretrained": copy.deepcopy(net)}


def attributed(state: State, *, steps: int, lr: float, batch: int, held: float) -> dict[str, Any]:
    """Train the ANet on the attributes of the images its patches come from; arguments as above."""
    net = _copy(state)
    rows = _rows(state, net, held)[0]
    patches = _chunked(net.patches, rows["pixel_values"])
    trained(
        net.anet, {"pixel_values": patches, "labels": rows["labels"]}, lambda model, b: model(**b).loss,
        steps=steps, lr=lr, batch=batch, seed=_seed(state, "attributed"),
    )  # fmt: skip
    return {"tuned": net}


def classified(state: State, *, C: float, held: float) -> dict[str, Any]:
    """Solve for one linear SVM an attribute over the units of all patches; `accuracy` is that of held-back rows.

    Raises:
        RequestError: an attribute that all rows have or none, or no scikit-learn.
    """
    net = _copy(state)
    fitting, test = _rows(state, net, held)
    weight, bias = linear(_chunked(_described(net), fitting["pixel_values"]), fitting["labels"], C=C, seed=_seed(state))
    with torch.no_grad():
        net.svm.weight.copy_(weight)
        net.svm.bias.copy_(bias)
    right = (_chunked(lambda x: net(x).logits, test["pixel_values"]) > 0) == test["labels"].bool()
    return {"tuned": net, "accuracy": [float(v) for v in right.float().mean(0)]}


def explained(state: State, *, most: int, C: float, held: float) -> dict[str, Any]:
    """Read every attribute from few units (`readouts`), and tell how fine-tuning sharpened them (`concepts`).

    Args:
        state: as above.
        most: units that a sparse readout may use.
        C: weight of the data to begin with; see `_read_out.read_out`.
        held: share of the rows held back, on which all of it is measured.
    """
    net = _copy(state)
    fitting, test = _rows(state, net, held)
    units = [_chunked(lambda x: net.anet(net.patches(x)).features, r["pixel_values"]) for r in (fitting, test)]
    name = "anet.fc/units"
    made: dict[str, Any] = {
        "readouts": [
            read_out(name, units[0], fitting["labels"][:, k], units[1], test["labels"][:, k], most=most, C=C,
                     seed=_seed(state))
            for k in range(net.labels)
        ]
    }  # fmt: skip
    before = state.get("pretrained")
    if before is not None:
        shown = {"pixel_values": _chunked(net.patches, test["pixel_values"]), "labels": test["labels"]}
        where = {"fc/units": units_of(net.anet, "fc/units")}
        made["concepts"] = unit_concepts(before.anet, net.anet, [shown], units=where, seed=_seed(state))
    return made


def shipped(state: State) -> dict[str, Any]:
    """Return the graft from the model to its trained copy."""
    return {"graft": diff(state["model"], _copy(state)), "tuned": None, "pretrained": None}


def units_of(anet: nn.Module, name: str = "fc/units") -> Site:
    """Return the units of an ANet's fully connected layer as they act, behind the rectifier."""
    fc: Any = anet.fc
    parts = (Part.rows("fc.weight", tuple(fc.weight.shape)), Part.entries("fc.bias", fc.out_features))
    return Site(name, "neuron", fc.out_features, parts, Tap("act"))


def trained(
    part: nn.Module, tensors: Mapping[str, Tensor], loss: Any, *, steps: int, lr: float, batch: int, seed: int
) -> None:
    """Train every parameter of a module in place, with AdamW, on rows drawn at random.

    Args:
        part: the module.
        tensors: columns of the batches, all with N rows; of patches [N, P, ...] one is drawn for each row.
        loss: (module, batch) -> scalar.
        steps: optimizer steps; a twentieth of them is warm-up, then the rate falls to 0.
        lr: learning rate.
        batch: rows in a step.
        seed: names the draws.
    """
    count = len(next(iter(tensors.values())))

    def feed(draw: int, phase: Any) -> Batch:
        rng = generator(seed, "draw", draw)
        ids = torch.randint(count, (min(batch, count),), generator=rng)
        found = {k: v[ids.to(v.device)] for k, v in tensors.items()}
        x = found["pixel_values"]
        if x.dim() == 5:
            at = torch.randint(x.shape[1], (len(x),), generator=rng).to(x.device)
            found["pixel_values"] = x[torch.arange(len(x), device=x.device), at]
        return found

    with attach(part) as live:
        fit(live, feed, steps=steps, lr=lr, objective=loss, warmup=max(1, steps // 20), decay="linear", seed=seed)
        values = {n: v.detach().clone() for n, v in part.state_dict().items()}
    part.load_state_dict(values)


def _described(net: Cascade) -> Any:
    return lambda x: net.anet(net.patches(x)).features.flatten(1)


def _copy(state: State) -> Cascade:
    net = state.get("tuned") or state["model"]
    if not isinstance(net, Cascade):
        raise RequestError(
            f"a {type(net).__name__}", expected="a cascade", do="give neurograft.networks.cascade, or one made with it"
        )
    return net if state.get("tuned") is not None else copy.deepcopy(net).eval()


def _seed(state: State, *names: object) -> int:
    seed = int(state.get("common", {}).get("seed", 0))
    return derive(seed, *names) if names else seed


def _chunked(function: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(CHUNK)])


def _rows(
    state: State, net: Cascade, held: float, need: tuple[str, ...] = ("labels",)
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the columns of the rows that are learned from, and of those held back."""
    with as_found(net):
        batches = as_batches(state["data"], net)
    for column in ("pixel_values", *need):
        if any(column not in b for b in batches):
            raise RequestError(f"rows without {column}", expected="it in every row", do="add the column")
    joined = {k: torch.cat([b[k] for b in batches]) for k in ("pixel_values", *need)}
    count = len(joined["pixel_values"])
    order = torch.randperm(count, generator=generator(_seed(state), "held back"))
    cut = round(held * count)
    if not 0 < cut < count:
        raise RequestError(
            f"{count} rows of which {held:g} are held back", expected="some of both", do="give more rows"
        )
    back, kept = order[:cut].sort().values, order[cut:].sort().values
    return tuple({k: v[i.to(v.device)] for k, v in joined.items()} for i in (kept, back))  # type: ignore[return-value]
