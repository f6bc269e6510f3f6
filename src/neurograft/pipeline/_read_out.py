"""Attributes read from features: linear SVMs, and sparse readouts through the probe.

Shape letters: N examples, D features, P patches, F units, A attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import Context
from neurograft.core.errors import RequestError, extra
from neurograft.core.units import Site, Tap
from neurograft.locators.probe import probe

LARGEST = 64.0


def linear(features: Tensor, labels: Tensor, *, C: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return weights [A, D] and biases [A] of one linear SVM an attribute (scikit-learn's LinearSVC).

    Args:
        features: float32 [N, D].
        labels: 0 or 1, [N, A].
        C: weight of the data.
        seed: of liblinear.

    Raises:
        RequestError: an attribute that all examples have or none; no scikit-learn.
    """
    with extra("probes", what="linear SVMs"):
        from sklearn.svm import LinearSVC
    x, found = features.double().cpu().numpy(), []
    for k, column in enumerate(labels.cpu().long().t()):
        if len(column.unique()) < 2:
            raise RequestError(
                f"attribute {k}, which {'all' if int(column[0]) else 'none'} of {len(column)} examples have",
                expected="examples with and without it",
                do="give more examples, or leave the attribute out",
            )
        svm = LinearSVC(C=C, max_iter=20000, random_state=seed).fit(x, column.numpy())
        found.append(torch.cat([torch.from_numpy(svm.coef_[0]), torch.from_numpy(svm.intercept_)]))
    made = torch.stack(found).to(features)
    return made[:, :-1], made[:, -1]


def read_out(
    name: str, units: Tensor, label: Tensor, test: Tensor, asked: Tensor, *, most: int, C: float, seed: int = 0
) -> dict[str, Any]:
    """Read one attribute from few units and from all: L1 and L2 logistic regression.

    Units are averaged over patches and brought to mean 0 and deviation 1 for the fit, since liblinear penalises the
    intercept too; the weights are those of the units themselves.

    Args:
        name: of the units' site.
        units: [N, P, F], to fit on.
        label: 0 or 1, [N].
        test: [M, P, F], to measure on.
        asked: 0 or 1, [M].
        most: units the sparse readout may use.
        C: weight of the data, the dense readout's too; for the sparse one it is raised while no unit has a weight,
            then lowered by fifths until no more than `most` have.
        seed: of liblinear.

    Returns:
        `units` (number -> weight; none where nothing tells the attribute), `intercept`, `C`, `accuracy`, and `dense`,
        the accuracy from all units.

    Raises:
        RequestError: an attribute that all examples have or none.
    """
    x, test, label, asked = units.float().mean(1).cpu(), test.float().mean(1).cpu(), label.cpu(), asked.cpu()
    middle, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-8)

    def fitted(fit: str, C: float) -> tuple[Tensor, float]:
        # Already pooled activations go through the probe as the outputs of a model that passes them on.
        site = Site(name, "neuron", units.shape[-1], tap=Tap("0"))
        sides = [[{"input": (x[label == side] - middle) / scale}] for side in (1, 0)]
        if not all(len(s[0]["input"]) for s in sides):
            raise RequestError("an attribute that all examples have or none", expected="both", do="give more examples")
        context = Context(nn.Sequential(nn.Identity()), {name: site}, sides[0], sides[1], seed=seed)
        found = probe(context, fit=fit, scope="all", pool="mean", score="weight", C=C)
        w = found.values[name] / scale
        return w, found.card["intercept"][name] - float(w @ middle)

    def right(w: Tensor, b: float) -> float:
        return float(((test @ w + b > 0) == asked.bool()).float().mean())

    dense = fitted("l2", C)
    w, b = fitted("l1", C)
    while not bool(w.any()) and C < LARGEST:
        C = C * 4
        w, b = fitted("l1", C)
    while int((w != 0).sum()) > most:
        C = C / 1.25
        w, b = fitted("l1", C)
    ids = w.nonzero()[:, 0].tolist()
    return {
        "units": {i: float(w[i]) for i in ids}, "intercept": b, "C": C, "accuracy": right(w, b), "dense": right(*dense),
    }  # fmt: skip
