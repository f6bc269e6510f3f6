"""Steps of recipes for a cascade of LNets and an ANet: each trains one stage on a copy of the network.

The copy goes from step to step as `tuned`; `shipped` makes the graft. A share of the rows is held back from every
stage, and what is reported is measured on those.

Shape letters: N examples, P patches, F units, A attributes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits.unit_concepts import unit_concepts
from neurograft.core.context import Batch
from neurograft.networks.anet import units_of
from neurograft.networks.cascade import Cascade, cut
from neurograft.networks.identity_loss import identity_loss
from neurograft.pipeline._cascade import State, chunked, copied, rows_of, seed_of, trained
from neurograft.pipeline._read_out import linear, read_out
from neurograft.pipeline.diff import diff


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
    net = copied(state)
    rows = rows_of(state, net, held)[0]
    shown = rows["pixel_values"]
    for level, lnet in enumerate(net.lnets):
        trained(
            lnet,
            {"pixel_values": shown, "labels": rows["labels"]},
            lambda model, b: model(**b).loss,
            steps=steps, lr=lr, batch=batch, seed=seed_of(state, "localiser", level),
        )  # fmt: skip
        shown = chunked(lambda x, level=level: cut(x, net.where(x, level), net.windows[level]), shown)
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
    net = copied(state)
    rows = rows_of(state if data is None else {**state, "data": data}, net, held, need=("identity",))[0]
    patches = chunked(net.patches, rows["pixel_values"])

    def loss(model: nn.Module, b: Batch) -> Tensor:
        made = model(b["pixel_values"])
        return identity_loss(made.identities[:, 0], made.features[:, 0], b["identity"], pull=pull, towards=towards)

    trained(
        net.anet, {"pixel_values": patches, "identity": rows["identity"]}, loss,
        steps=steps, lr=lr, batch=batch, seed=seed_of(state, "identified"),
    )  # fmt: skip
    return {"tuned": net, "pretrained": copy.deepcopy(net)}


def attributed(state: State, *, steps: int, lr: float, batch: int, held: float) -> dict[str, Any]:
    """Train the ANet on the attributes of the images its patches come from; arguments as above."""
    net = copied(state)
    rows = rows_of(state, net, held)[0]
    patches = chunked(net.patches, rows["pixel_values"])
    trained(
        net.anet, {"pixel_values": patches, "labels": rows["labels"]}, lambda model, b: model(**b).loss,
        steps=steps, lr=lr, batch=batch, seed=seed_of(state, "attributed"),
    )  # fmt: skip
    return {"tuned": net}


def classified(state: State, *, C: float, held: float) -> dict[str, Any]:
    """Solve for one linear SVM an attribute over the units of all patches; `accuracy` is that of held-back rows.

    Raises:
        RequestError: an attribute that all rows have or none, or no scikit-learn.
    """
    net = copied(state)
    fitting, test = rows_of(state, net, held)
    weight, bias = linear(
        chunked(_described(net), fitting["pixel_values"]), fitting["labels"], C=C, seed=seed_of(state)
    )
    with torch.no_grad():
        net.svm.weight.copy_(weight)
        net.svm.bias.copy_(bias)
    right = (chunked(lambda x: net(x).logits, test["pixel_values"]) > 0) == test["labels"].bool()
    return {"tuned": net, "accuracy": [float(v) for v in right.float().mean(0)]}


def explained(state: State, *, most: int, C: float, held: float) -> dict[str, Any]:
    """Read every attribute from few units (`readouts`), and tell how fine-tuning sharpened them (`concepts`).

    Args:
        state: as above.
        most: units that a sparse readout may use.
        C: weight of the data to begin with; see `_read_out.read_out`.
        held: share of the rows held back, on which all of it is measured.
    """
    net = copied(state)
    fitting, test = rows_of(state, net, held)
    units = [chunked(lambda x: net.anet(net.patches(x)).features, r["pixel_values"]) for r in (fitting, test)]
    name = "anet.fc/units"
    made: dict[str, Any] = {
        "readouts": [
            read_out(name, units[0], fitting["labels"][:, k], units[1], test["labels"][:, k], most=most, C=C,
                     seed=seed_of(state))
            for k in range(net.labels)
        ]
    }  # fmt: skip
    before = state.get("pretrained")
    if before is not None:
        shown = {"pixel_values": chunked(net.patches, test["pixel_values"]), "labels": test["labels"]}
        where = {"fc/units": units_of(net.anet, "fc/units")}
        made["concepts"] = unit_concepts(before.anet, net.anet, [shown], units=where, seed=seed_of(state))
    return made


def shipped(state: State) -> dict[str, Any]:
    """Return the graft from the model to its trained copy."""
    return {"graft": diff(state["model"], copied(state)), "tuned": None, "pretrained": None}


def _described(net: Cascade) -> Any:
    return lambda x: net.anet(net.patches(x)).features.flatten(1)
