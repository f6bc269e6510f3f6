"""Find the units of a network that matter, change only those, ship the change as a small file, say what it cost.

    import neurograft as ng

    scores = ng.locate(model, data, by="grad_x_act", units="neuron")
    where = scores.top(fraction=0.01, per="layer")
    graft = ng.tune(model, data, where)
    report = ng.audit(model, graft, gain=test, keep={"general": general})

Nothing heavy is imported until a verb is used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurograft.core.errors import RequestError, RunError
    from neurograft.core.grafts.graft import Graft
    from neurograft.core.selection import Scores, Selection
    from neurograft.pipeline.attach import attach
    from neurograft.pipeline.audit import audit
    from neurograft.pipeline.cite import cite
    from neurograft.pipeline.diff import diff
    from neurograft.pipeline.edit import edit
    from neurograft.pipeline.evidence import evidence
    from neurograft.pipeline.intervene import intervene
    from neurograft.pipeline.locate import locate
    from neurograft.pipeline.neuron import neuron
    from neurograft.pipeline.papers import papers
    from neurograft.pipeline.plan import plan
    from neurograft.pipeline.recipe import Recipe, recipe
    from neurograft.pipeline.rollback import rollback
    from neurograft.pipeline.run import run
    from neurograft.pipeline.select import select
    from neurograft.pipeline.trim import trim
    from neurograft.pipeline.tune import tune
    from neurograft.train.callback import GraftCallback
    from neurograft.train.mixin import GraftTrainerMixin

__version__ = "0.1.0"

_HOME = {
    "Graft": "neurograft.core.grafts.graft",
    "GraftCallback": "neurograft.train.callback",
    "GraftTrainerMixin": "neurograft.train.mixin",
    "Recipe": "neurograft.pipeline.recipe",
    "RequestError": "neurograft.core.errors",
    "RunError": "neurograft.core.errors",
    "Scores": "neurograft.core.selection",
    "Selection": "neurograft.core.selection",
    "attach": "neurograft.pipeline.attach",
    "audit": "neurograft.pipeline.audit",
    "cite": "neurograft.pipeline.cite",
    "diff": "neurograft.pipeline.diff",
    "edit": "neurograft.pipeline.edit",
    "evidence": "neurograft.pipeline.evidence",
    "intervene": "neurograft.pipeline.intervene",
    "locate": "neurograft.pipeline.locate",
    "neuron": "neurograft.pipeline.neuron",
    "papers": "neurograft.pipeline.papers",
    "plan": "neurograft.pipeline.plan",
    "recipe": "neurograft.pipeline.recipe",
    "rollback": "neurograft.pipeline.rollback",
    "run": "neurograft.pipeline.run",
    "select": "neurograft.pipeline.select",
    "trim": "neurograft.pipeline.trim",
    "tune": "neurograft.pipeline.tune",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        later = f"; the verb {name} comes with a later version" if name in ("merge", "route") else ""
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{later}", name=name, obj=sys.modules[__name__]
        )
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
