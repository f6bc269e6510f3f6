"""What an audit measures: gain, loss and the probes beside them, on the same runs of base and change."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from neurograft.audits._changes import Change
from neurograft.audits._paired import Runs, runs
from neurograft.audits.gain import BUILT_IN, Metrics
from neurograft.audits.gain import gain as measure_gain
from neurograft.audits.loss import loss as measure_loss
from neurograft.core.choose import Choice, Chosen, asked, choose, methods
from neurograft.core.context import Batch
from neurograft.core.errors import RequestError

Probes = str | Sequence[Choice]


def probes_of(probes: Probes) -> list[Chosen]:
    """Return the audits that are asked for: "all" that know their noise floor, "none", or those that are named."""
    if probes == "none":
        return []
    if probes == "all":
        found = [choose("audits", name) for name in methods("audits") if name not in ("gain", "loss")]
        return [probe for probe in found if "noise_floor" in probe.card.claims]
    listed = [probes] if isinstance(probes, str) else probes
    return [choose("audits", probe) for probe in listed]


def metrics_of(metrics: Metrics | str | Mapping[str, Any]) -> Metrics:
    """Return metrics with those in place that were given by their dotted name.

    Raises:
        RequestError: no such callable, or a name without a dot.
    """
    if isinstance(metrics, Mapping):
        return {str(name): _metric(given) for name, given in metrics.items()}
    return None if metrics is None else _metric(metrics)


def _metric(given: Any) -> Any:
    if isinstance(given, str) and "." in given:
        return Chosen(asked(given), name=given, room="metrics")
    if callable(given):
        return given
    raise RequestError(
        f"the metric {given!r}",
        expected="a callable (model, batch) -> one number for each row, or its dotted name",
        do=f"write it as mypackage.mymodule.{given if str(given).isidentifier() else 'mine'}"
        + (f"; {', '.join(BUILT_IN)} are measured without being asked for" if given in BUILT_IN else ""),
    )


@dataclass(frozen=True)
class Measuring:
    """One change, measured on one set of data after the other.

    Args:
        model: the base.
        change: what is measured against it.
        metrics: (model, batch) -> one number for each row, or several by name; they stand in for class labels.
        probes: methods of `neurograft.audits` besides gain and loss.
        options: `level`, `draws`, `nulls` and `seed`, for every method that takes them.
    """

    model: nn.Module
    change: Change
    metrics: Metrics
    probes: Sequence[Chosen]
    options: Mapping[str, Any]

    def task(self, batches: list[Batch], *, by: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the gain on the task, decided by one of its measures, and what the probes of paired runs say there."""
        measured = self._runs(batches)
        how = {"by": by, "metrics": self.metrics, "measured": measured, **self.options}
        found = measure_gain(self.model, self.change, batches, **how)
        beside = [probe for probe in self.probes if _takes(probe, "measured")] if measured is not None else []
        return found, {_short(p): self._run(p, batches, measured) for p in beside}

    def domain(self, batches: list[Batch]) -> dict[str, Any]:
        """Return the loss on a kept domain, and what the probes that look at data say there."""
        measured = self._runs(batches)
        metric = None
        if measured is None:
            metric = next(iter(self.metrics.values())) if isinstance(self.metrics, Mapping) else self.metrics
        how = {"measured": measured, "metric": metric, **self.options}
        found = {"loss": measure_loss(self.model, self.change, batches, **how)}
        for probe in self.probes:
            if _by_domain(probe) and (measured is not None or "labels" not in probe.card.needs):
                found[_short(probe)] = self._run(probe, batches, measured)
        return found

    def whole(self) -> dict[str, Any]:
        """Return what the probes say that look at no data."""
        return {_short(probe): probe(self.model, self.change) for probe in self.probes if not _by_domain(probe)}

    def _runs(self, batches: list[Batch]) -> Runs | None:
        """Return the paired runs; None where the outputs are no classes and a metric stands in for them."""
        try:
            return runs(self.model, self.change, batches, nulls=self.options["nulls"], seed=self.options["seed"])
        except RequestError:
            if self.metrics is None:
                raise
            return None

    def _run(self, probe: Chosen, batches: list[Batch], measured: Runs | None) -> dict[str, Any]:
        """Run a probe with those of our options it takes and does not set itself."""
        ours = {k: v for k, v in self.options.items() if k not in probe.options and k != "nulls"}
        given = {k: v for k, v in ours.items() if _takes(probe, k)}
        if measured is not None and _takes(probe, "measured"):
            given["measured"] = measured
        found: dict[str, Any] = probe(self.model, self.change, batches, **given)
        return found


def _by_domain(probe: Chosen) -> bool:
    """Say whether a probe looks at data; one without a card does."""
    return not hasattr(probe.function, "card") or "batches" in probe.card.needs


def _short(probe: Chosen) -> str:
    return probe.name.rpartition(".")[2]


def _takes(probe: Chosen, name: str) -> bool:
    return name in inspect.signature(probe.function).parameters
