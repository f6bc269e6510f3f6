"""`audit`: what did a change gain, what did it lose, and where?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurograft.audits._changes import Change, as_change
from neurograft.audits.gain import Metrics
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.graft import Graft
from neurograft.core.progress import Progress, quiet
from neurograft.pipeline._loaded import loaded
from neurograft.pipeline._measuring import Measuring, Probes, metrics_of, probes_of
from neurograft.pipeline._provenance import provenance
from neurograft.pipeline.inputs import as_batches
from neurograft.pipeline.models import Model, load_model
from neurograft.pipeline.state import as_found
from neurograft.pipeline.touched import pages
from neurograft.report.report import Report
from neurograft.report.rules import Rules, rules_of

BRIEF = 3  # pages of neurons that nobody asked for


def audit(
    model: Model,
    graft: Graft | nn.Module | str | Path | Sequence[Graft | str | Path],
    *,
    gain: Any = None,
    keep: Mapping[str, Any] | None = None,
    metrics: Metrics | str | Mapping[str, str] = None,
    probes: Probes = "all",
    neurons: int | None = None,
    processing_class: Any = None,
    rules: Rules = None,
    batch_size: int = 8,
    max_length: int = 1024,
    limit: int | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Report:
    """Measure what a change gained and lost against its base, and say whether it should ship.

    Every number is a difference between base and change on the same items, with a bootstrap interval over items and
    a measured noise floor: the base run again, and random changes of the same size in as many random places.

    Args:
        model: the base: a module, a folder, a Hub id or a shipped model; left bit for bit as found.
        graft: a graft, a graft's folder, several of either, or a tuned model of the same base, live or by path.
        gain: task data with labels, not used for training.
        keep: name of a domain -> data on which nothing should get worse. Text without labels counts as labelled
            with itself.
        metrics: (model, batch) -> one number for each row, higher is better; or its dotted name; or name -> either. The
            first one then decides on the gain, unless the rule `gain` names another measure; and on the loss, where a
            domain's outputs are no classes.
        probes: "all", "none", or methods of `neurograft.audits`, to be measured beside gain and loss.
        neurons: pages of so many of the neurons that the change touches most, on the first 64 examples of `gain`, or
            of the first domain; each costs about twenty passes over these. None: three brief ones, on 16 examples and
            without what their silence costs.
        processing_class: tokenizer or processor for raw data; the one saved with the model if None.
        rules: changes to `neurograft.report.rules.DEFAULT`, or a YAML or JSON file of them.
        batch_size: examples in a batch.
        max_length: longer texts are cut.
        limit: use at most so many examples of each data set.
        revision: of a Hub id.
        dtype: load the weights so.
        device_map: as for `from_pretrained`.
        progress: (items, what) -> items, to show a bar.
        seed: root of every random number.

    Returns:
        The report: `verdict`, `sentence`, `exit_status`, `as_dict()`, `save(folder)`, `judged(other_rules)`.

    Raises:
        RequestError: neither gain nor keep, data without labels, a graft for another base, an unknown probe or rule.
    """
    if gain is None and not keep:
        raise RequestError("neither gain nor keep", expected="data for at least one", do="audit(..., gain=test)")
    if neurons is not None and neurons < 0:
        raise RequestError(f"neurons={neurons}", expected="at least 0", do="give neurons=0 for no page")
    chosen, asked, counted = rules_of(rules), probes_of(probes), metrics_of(metrics)
    net = load_model(model, revision=revision, dtype=dtype, device_map=device_map)
    reading: dict[str, Any] = {"processing_class": processing_class, "batch_size": batch_size}
    reading |= {"max_length": max_length, "limit": limit}
    task = None if gain is None else as_batches(gain, net, **reading)
    domains = {name: as_batches(data, net, **reading) for name, data in (keep or {}).items()}
    options = {"level": chosen["level"], "draws": chosen["draws"], "nulls": chosen["nulls"], "seed": seed}
    with as_found(net):
        change = as_change(net, loaded(graft))
        measuring = Measuring(net, change, counted, asked, options)
        measured: dict[str, Any] = {"gain": None, "task": {}, "domains": {}, "whole": {}}
        if task is not None:
            measured["gain"], measured["task"] = measuring.task(task, by=chosen["gain"])
        names = list(domains)
        for name in (progress or quiet)(names, "kept domains"):
            measured["domains"][name] = measuring.domain(domains[name])
        measured["whole"] = measuring.whole()
        if neurons is None or neurons > 0:
            shown = task if task is not None else next(iter(domains.values()))
            how: dict[str, Any] = {"processing_class": processing_class, "seed": seed, "progress": progress}
            measured |= _pages(net, change, shown, neurons, how)
        measured["provenance"] = provenance(net, change, task, domains, seed)
    return Report.of(measured, chosen)


def _pages(
    model: nn.Module, change: Change, batches: list[Batch], neurons: int | None, how: dict[str, Any]
) -> dict[str, Any]:
    """Return neuron pages; those nobody asked for give way to the reason why there are none."""
    if neurons is not None:
        return {"neurons": pages(model, change, batches, count=neurons, **how)}
    try:
        return {"neurons": pages(model, change, batches, count=BRIEF, brief=True, **how)}
    except (RequestError, RunError) as error:
        return {"neurons": [], "no_neurons": str(error)}
