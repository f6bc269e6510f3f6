"""`neuron`: one unit's page, as plain data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from neurograft.anatomy.describe import anatomy
from neurograft.anatomy.sites import sites
from neurograft.audits.evidence import evidence
from neurograft.core.context import Batch, shifts
from neurograft.core.errors import RequestError, one_of
from neurograft.core.ranges import least
from neurograft.core.selection import Selection
from neurograft.core.taps.describe import describe
from neurograft.core.taps.exemplars import as_seen, exemplify
from neurograft.core.units import KINDS, Parameters, Site
from neurograft.locators._describers import describer_for
from neurograft.pipeline._page import Words, active, alone, ends
from neurograft.pipeline.inputs import as_batches, data_digest, processor_for
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.state import as_found

DESCRIPTIONS = 3


def neuron(
    model: Model,
    unit: str,
    data: Any = None,
    *,
    top: int = 10,
    partners: int = 5,
    controls: int = 10,
    describer: Any = None,
    limit: int | None = 256,
    processing_class: Any = None,
    batch_size: int = 8,
    max_length: int = 256,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Describe one unit: what makes it active, what it writes, whom it resembles, what its silence costs.

    Args:
        model: a module, a folder, a Hub id or a shipped model; left as found.
        unit: SITE:ID, a site's name and a unit's number, e.g. "model.layers.3.mlp/neuron:17".
        data: examples; without them only what the weights say.
        top: examples with the highest activation, one place of each, and tokens at either end of the logits.
        partners: units of the site with the largest correlation over tokens.
        controls: single random, and equally active, units of the site to compare its silence with; 0 to leave the
            silence out, which takes most of the time.
        describer: what puts it into words: a describer, the folder of a saved one, "tokens", "words" or "captions";
            None for tokens where the data are texts and words taught on synthetic scenes where they are images.
        limit: use at most so many examples.
        processing_class: tokenizer or processor; the one saved with the model if None.
        batch_size: examples in a batch.
        max_length: longer texts are cut.
        revision: of a Hub id.
        dtype: load the weights so.
        device_map: as for `from_pretrained`.
        seed: root of every random number.

    Returns:
        `unit`; `writes`: tokens its written vector raises and lowers through the unembedding, norms left out (None
        where the vector does not have the head's width); and with data `activity`, `exemplars` (tokens with their
        activations), `description` (texts by weighted information, best first; None for data that are neither texts nor
        images), `silenced_logits` (mean change at its strongest places when it is silenced), `partners`,
        `silence` (as `ng.evidence` measures; None without labels or controls).

    Raises:
        RequestError: no such site or unit.
    """
    least(top=(top, 1), partners=(partners, 0), controls=(controls, 0))
    if data is None and describer is not None:
        raise RequestError("a describer and no data", expected="examples to describe", do="give data")
    net = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    site, number = located(net, unit)
    words = Words(processor_for(net, processing_class))
    with as_found(net):
        found: dict[str, Any] = {
            "unit": {"site": site.name, "id": number, "kind": site.kind, "at": site.at, "layer": site.layer},
            "writes": _written(net, site, number, words, top),
        }
        if data is None:
            return found
        batches = as_batches(
            data, net, processing_class=processing_class, batch_size=batch_size, max_length=max_length, limit=limit
        )
        if site.tap is not None:
            found |= active(net, site, number, batches, words, top=top, partners=partners, seed=seed)
            found["description"] = _said(net, site, number, batches, describer, words.processor, seed)
        labelled = shifts(net) or all(b.get("labels") is not None for b in batches)
        where = Selection.of({site.name: site}, {site.name: [number]})
        effect = evidence(net, where, batches, controls=controls, seed=seed) if labelled and controls else None
        keep = ("effect", "families", "base_loss", "examples", "verdict", "sentence")
        found["silence"] = None if effect is None else {k: effect[k] for k in keep}
        found["data"] = data_digest(batches)
    return found


def located(model: nn.Module, unit: str) -> tuple[Site, int]:
    """Return the site and number that SITE:ID names.

    Raises:
        RequestError: another form, an unknown site, a number out of range.
    """
    name, _, number = unit.rpartition(":")
    _, slash, what = name.rpartition("/")
    if not number.isdigit() or not slash:
        raise RequestError(
            f"the unit {unit!r}", expected="SITE:ID", do="name it as in model.layers.3.mlp/neuron:17 (see anatomy)"
        )
    kind, _, at = what.partition("@")
    known = sites(model, one_of(kind, KINDS, what="unit kind"), at=at or None)
    site = known[one_of(name, known, what="site")]
    if int(number) >= site.n:
        raise RequestError(f"unit {number} of {name}", expected=f"0 to {site.n - 1}", do="count units from 0")
    return site, int(number)


def _said(
    model: nn.Module, site: Site, number: int, batches: list[Batch], describer: Any, processor: Any, seed: int
) -> list[dict[str, Any]] | None:
    """Return the best descriptions of a unit with their scores, nats."""
    if not {"input_ids", "pixel_values"} & batches[0].keys():
        return None
    seen = as_seen(model, site, batches)
    speaker = describer_for(seen, describer, processor=processor, seed=seed)
    (one,) = exemplify(model, {site.name: alone(site, number)}, batches, seed=seed).values()
    found = describe(speaker, one.shown(0, seen))[:DESCRIPTIONS]
    return [{"text": d.text, "score": d.score, "likelihood": d.likelihood, "prior": d.prior} for d in found]


def _written(model: nn.Module, site: Site, number: int, words: Words, top: int) -> dict[str, Any] | None:
    head = anatomy(model).head
    weight: Any = getattr(model.get_submodule(head), "weight", None) if head else None
    parameters = Parameters.of(model)
    for i in site.writes:
        part = site.parts[i]
        if weight is None or weight.dim() != 2 or part.size != weight.shape[1] or not _outward(site, part.param):
            continue
        vector = part.read(parameters.by_name[parameters.alias[part.param]], torch.tensor([number]))[0]
        scores = weight.detach().float() @ vector.float()
        return {"norm": float(vector.float().norm()), "spread": float(scores.std()), **ends(scores.cpu(), words, top)}
    return None


def _outward(site: Site, param: str) -> bool:
    """Say whether a part holds what the unit writes, not what it reads with."""
    return site.tap is not None and site.tap.side == "input" and param.startswith(site.tap.module)
