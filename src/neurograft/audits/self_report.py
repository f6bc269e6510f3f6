"""Whether a model can say by which weights it decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._agreement import agreement, standardised
from neurograft.audits._asked import preferred, replies
from neurograft.audits._changes import evaluating
from neurograft.audits._slopes import slopes
from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of
from neurograft.worlds.preference_words import Words
from neurograft.worlds.preferences import Scenario, Speaker

STANDARDS = ("scenario", "pooled")
SHOWN = 5


@method(
    paper="self-interpretability",
    departs="The likeliest slopes under the prior, where the reference takes the mean of samples from the posterior. "
    "A choice is the likelier of the two letters, which greedy decoding also says wherever it says either; `mass` "
    "tells how probable the two are. The interval is a bootstrap over scenarios, not a mixed model. Weights are "
    "measured on the model that reports, so a report is held against what this model does now.",
)
def self_report(
    model: nn.Module,
    scenarios: Sequence[Scenario],
    *,
    processor: Any = None,
    speaker: Speaker | None = None,
    trials: int = 50,
    reports: int = 10,
    length: int | None = None,
    standardise: str = "scenario",
    controls: int = 1000,
    batch_size: int = 32,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Correlate reported with measured weights: r over all attributes of all scenarios, after standardising.

    Measured weights are the slopes of logistic regressions of the choices on normalised attribute differences, with
    the prior N(0, 1); reported ones are the mean of what the model says, asked about fresh trials. Two controls show
    what r would be without knowledge of the scenario: the same reports handed out to other scenarios, and the mean
    report given for every scenario.

    Args:
        model: a causal or chat model; left as found. Put grafts on first to measure them.
        scenarios: at least two, of K attributes each.
        processor: the model's tokenizer.
        speaker: how trials are put and answers read, instead of words and a tokenizer.
        trials: choices a scenario.
        reports: reports a scenario, each about another trial; greedy.
        length: tokens a report may take; the speaker's if None.
        standardise: "scenario", each scenario's K weights to mean 0 and deviation 1; "pooled", as the reference:
            slopes scaled so that the largest of a scenario is 100, and reports as they are.
        controls: how often the reports are shuffled.
        batch_size: prompts in a batch.
        level: of the interval.
        draws: of the bootstrap.
        seed: names trials, shuffles and draws.

    Returns:
        `r` with its interval, or None where fewer than two scenarios have a report; `shuffled`: `mean`, `limit`
        (the level's quantile) and `p`, the share of shuffles that reach r; `profile_mean` and `above_mean`, the mean
        report's r and r less that, with intervals; `reports`: `asked`, `read`, `unread`, `reasons`, `examples` of
        unread replies, `scenarios` without any; `choices`: `asked`, `one_sided` scenarios, `mass`; `measured` and
        `reported` by scenario; `instilled`: r of both with the scenarios' own weights, where all have some.

    Raises:
        RequestError: fewer than two scenarios, scenarios of different K or one name, no tokenizer, no scikit-learn.

    Example:
        >>> from neurograft.worlds.preference_tokens import preference_tokens
        >>> world = preference_tokens(3)
        >>> model = world.speaker.base(steps=2)
        >>> found = self_report(model, world.scenarios, speaker=world.speaker, trials=4, reports=1, draws=10)
        >>> found["choices"]["asked"], found["reports"]["asked"]
        (12, 3)
    """
    one_of(standardise, STANDARDS, what="standard")
    _checked(scenarios)
    how = speaker or Words(_needed(processor))
    with evaluating(model):
        measured, choices = _measured(model, scenarios, how, trials, batch_size, seed)
        reported, told = _reported(model, scenarios, how, reports, length or how.length, batch_size, seed)
    kept = [i for i, r in enumerate(reported) if r is not None]
    x, y = torch.stack([r for r in reported if r is not None]) if kept else torch.empty(0), measured[kept]
    options: dict[str, Any] = {"controls": controls, "level": level, "draws": draws, "seed": seed}
    own = None
    if all(s.weights is not None for s in scenarios):
        given = standardised(torch.tensor([s.weights for s in scenarios], dtype=torch.float64))
        pairs = {"measured": (standardised(measured), given), "reported": (standardised(x), given[kept])}
        own = {key: agreement(*pair, **{**options, "controls": 1})["r"] for key, pair in pairs.items()}
    if standardise == "pooled":
        y = y / y.abs().amax(1, keepdim=True).clamp(min=1e-12) * 100
    else:
        x, y = standardised(x), standardised(y)
    names = [s.name for s in scenarios]
    return {
        **agreement(x, y, **options),
        "reports": told,
        "choices": choices,
        "measured": dict(zip(names, measured.tolist())),
        "reported": {n: None if r is None else r.tolist() for n, r in zip(names, reported)},
        "instilled": own,
        "standardise": standardise,
    }


def _measured(
    model: nn.Module, scenarios: Sequence[Scenario], how: Speaker, trials: int, batch_size: int, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Return the slopes, float64 [S, K], and how the choices went."""
    drawn = [s.trials(trials, seed=seed, part="choices") for s in scenarios]
    prompts = [how.decide(s, trial) for s, many in zip(scenarios, drawn) for trial in many]
    won, mass = preferred(model, prompts, how.letters(), batch_size=batch_size)
    each = won.reshape(len(scenarios), trials)
    found = []
    for scenario, many, chosen in zip(scenarios, drawn, each):
        shares = scenario.shares(many)
        found.append(slopes(shares[:, 0] - shares[:, 1], chosen))
    sided = [s.name for s, c in zip(scenarios, each) if bool(c.all()) or not bool(c.any())]
    return torch.stack(found), {"asked": len(prompts), "one_sided": sided, "mass": float(mass.mean())}


def _reported(
    model: nn.Module, scenarios: Sequence[Scenario], how: Speaker, reports: int, length: int, batch_size: int, seed: int
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Return each scenario's mean report, float64 [K], or None if none could be read, and how they went."""
    prompts = [how.explain(s, t) for s in scenarios for t in s.trials(reports, seed=seed, part="reports")]
    said = replies(model, prompts, length=length, batch_size=batch_size)
    reasons: Counter[str] = Counter()
    found: list[Tensor | None] = []
    unread: list[str] = []
    for i, scenario in enumerate(scenarios):
        good = []
        for reply in said[i * reports : (i + 1) * reports]:
            weights = how.read(scenario, reply)
            if isinstance(weights, str):
                reasons[weights] += 1
                unread.append(how.spell(reply)[:200])
            else:
                good.append(weights)
        found.append(torch.tensor(good, dtype=torch.float64).mean(0) if good else None)
    return found, {
        "asked": len(prompts),
        "read": len(prompts) - len(unread),
        "unread": len(unread),
        "reasons": dict(sorted(reasons.items())),
        "examples": unread[:SHOWN],
        "scenarios": [s.name for s, r in zip(scenarios, found) if r is None],
    }


def _needed(processor: Any) -> Any:
    if processor is None:
        raise RequestError("no tokenizer", expected="the model's", do="pass processor=tokenizer")
    return processor


def _checked(scenarios: Sequence[Scenario]) -> None:
    sizes = {len(s.attributes) for s in scenarios}
    if len(scenarios) < 2 or len(sizes) != 1 or min(sizes) < 2 or len({s.name for s in scenarios}) != len(scenarios):
        raise RequestError(
            f"{len(scenarios)} scenarios of {sorted(sizes)} attributes",
            expected="two or more with names of their own, all with one number of attributes, 2 or more",
            do="rename or leave out the odd ones",
        )
