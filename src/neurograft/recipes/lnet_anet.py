"""LNet and ANet: faces found and described by networks that only ever saw tags of whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurograft.core.card import method
from neurograft.pipeline.recipe import Recipe

STEP = "neurograft.pipeline.cascaded"


@method(
    paper="lnet-anet",
    needs={"labels"},
    departs="The LNets start from the weights the network has; the paper's were pre-trained on generic objects. Every "
    "stage is trained by itself and only then the next; each patch of a face is drawn as often as any other. How the "
    "paper picks among response peaks and which form its identity term has is read from memory; localise= and "
    "towards= offer both readings. Learning rates, steps, C and the weight of the pull are ours.",
)
def lnet_anet(
    *,
    labels: int = 6,
    identities: int = 64,
    windows: Sequence[int] = (24, 20),
    patch: int = 16,
    stride: int = 4,
    localise: str = "peaks",
    pretrain: bool = True,
    identity_data: str | None = None,
    pull: float = 0.01,
    towards: str = "mean",
    lnet_steps: int = 400,
    identity_steps: int = 700,
    attribute_steps: int = 150,
    lr: float = 3e-3,
    attribute_lr: float = 1e-3,
    batch: int = 64,
    C: float = 1.0,
    most: int = 10,
    held: float = 0.2,
) -> Recipe:
    """Train LNets on tags, an ANet on identities and then on attributes, and one linear SVM for each attribute.

    The model is a `neurograft.networks.cascade`, live or by that name; the data are rows with `pixel_values`
    [3, H, W], `labels` of 0 and 1 [A] and, to pre-train on, `identity`. The graft turns the network into the trained
    one. Beside it: `accuracy` of each attribute, `readouts` (each attribute from at most `most` units of the ANet)
    and `concepts` (how well single units tell the attributes before and after fine-tuning), all on rows held back.

    Args:
        labels: attributes of the data; this and the next five describe the network, if it is named.
        identities: identities of the data.
        windows: side in pixels of what each LNet cuts out, head and shoulders first; as many LNets as windows.
        patch: side of the overlapping patches of the last window.
        stride: pixels between them.
        localise: the densest of the "peaks", or the middle of what lies above a "threshold".
        pretrain: pre-train the ANet on identities.
        identity_data: a file with rows to pre-train on, instead of the run's data.
        pull: weight of the pull between features of one identity.
        towards: "mean" of the identity, or "pairs" of it.
        lnet_steps: optimizer steps of every LNet.
        identity_steps: of the pre-training.
        attribute_steps: of the fine-tuning.
        lr: learning rate of LNets and pre-training.
        attribute_lr: of the fine-tuning.
        batch: rows in a step.
        C: weight of the data in SVMs and readouts.
        most: units a sparse readout may use.
        held: share of the rows that nothing is trained on.
    """
    common: dict[str, Any] = {"batch": batch, "held": held}
    steps: list[dict[str, Any]] = [{"do": f"{STEP}.localisers", "steps": lnet_steps, "lr": lr, **common}]
    if pretrain:
        how = {"pull": pull, "towards": towards, "steps": identity_steps, "lr": lr, "data": identity_data}
        steps.append({"do": f"{STEP}.identified", **how, **common})
    steps += [
        {"do": f"{STEP}.attributed", "steps": attribute_steps, "lr": attribute_lr, **common},
        {"do": f"{STEP}.classified", "C": C, "held": held},
        {"do": f"{STEP}.explained", "most": most, "C": C, "held": held},
        {"do": f"{STEP}.shipped"},
    ]
    network = {"labels": labels, "identities": identities, "windows": list(windows), "patch": patch, "stride": stride}
    made = ("neurograft.networks.cascade", {**network, "localise": localise})
    return Recipe("lnet_anet", tuple(steps), paper="lnet-anet", network=made)
