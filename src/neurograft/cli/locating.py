"""`locate` on the command line: it keeps some examples back and says what the best units are worth on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from neurograft.cli import results
from neurograft.cli.before import keep_inputs, quiet, writable
from neurograft.cli.options import command_of
from neurograft.cli.show import Shown
from neurograft.cli.sketch import sketch
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve

LEAST, MOST, SHARE = 8, 64, 4
ANSWERS = frozenset({"label", "labels", "target"})


def command(words: Mapping[str, Any], extra: list[inspect.Parameter]) -> Callable[..., None]:
    """Return the command: the verb's own options and how much evidence is wanted.

    Args:
        words: the positional arguments.
        extra: options that every command has.
    """
    verb = sketch("neurograft.pipeline.locate")
    more = {
        "evidence": (bool, True, "--evidence/--no-evidence", "Silence the best units beside matched controls."),
        "held_out": (str | None, None, "--held-out", "Examples for evidence; a part of DATA if left out."),
        "fraction": (float, 0.01, "--fraction", "Share of the units that evidence is about."),
        "controls": (int, 20, "--controls", "Control selections of each family."),
    }
    asked = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, typer.Option(flag, help=text)],
        )
        for name, (kind, default, flag, text) in more.items()
    ]
    return command_of(verb, _body, arguments=words, extra=[*asked, *extra])


def _body(given: dict[str, Any]) -> None:
    target, shown = given.pop("output"), Shown(given.pop("as_json"))
    wanted = {name: given.pop(name) for name in ("evidence", "held_out", "fraction", "controls")}
    keep_inputs(target, {**given, "held_out": wanted["held_out"]})
    writable(target, folder=False)
    if wanted["evidence"]:
        _check(wanted["fraction"], wanted["controls"])
    quiet()
    model, data = given.pop("model"), given.pop("data")
    loading = {k: given[k] for k in ("revision", "dtype", "device_map") if k in given}
    with shown.busy("loading"):
        net = resolve("neurograft.pipeline.models.load_model")(model, **loading)
    answers = ANSWERS | (
        {"completion"} if getattr(getattr(net, "config", None), "is_encoder_decoder", False) else set()
    )
    asked = {k: wanted[k] for k in ("evidence", "held_out")}
    data, held, reason = divided(data, **asked, seed=given.get("seed", 0), answers=answers)
    with shown.busy("locating"):
        rest = {k: v for k, v in given.items() if k not in loading}
        scores = resolve("neurograft.pipeline.locate")(net, data, **rest)
    proof = None
    if held is not None:
        shared = ("objective", "processing_class", "batch_size", "max_length", "seed")
        proof = resolve("neurograft.pipeline.evidence")(
            net,
            scores.top(fraction=wanted["fraction"]),
            held,
            controls=wanted["controls"],
            limit=MOST,
            progress=shown.progress,
            **{k: given[k] for k in shared if k in given},
        )
    results.scores(scores, Path(target) if target else None, shown, proof=proof, reason=reason)


def _check(fraction: float, controls: int) -> None:
    """Raise, before anything is located, if there could be no evidence in the end."""
    if not 0 < fraction <= 1:
        raise RequestError(f"fraction={fraction}", expected="more than 0, at most 1", do="give fraction=0.01")
    if controls < 1:
        raise RequestError(f"controls={controls}", expected="at least one", do="give controls=20, or --no-evidence")


def divided(
    data: Any, *, evidence: bool, held_out: str | None, seed: int, answers: Collection[str] = ANSWERS
) -> tuple[Any, Any, str]:
    """Return data for locating, data for evidence or None, and why there is none.

    A quarter of the examples, 8 to 64 of them, is kept back, drawn by the seed; the locator never sees them, nor
    their inputs with other answers. Data that cannot be divided so are all located on.

    Args:
        data: as for `locate`.
        evidence: whether it is wanted.
        held_out: data of its own for it.
        seed: draws the examples.
        answers: columns that the model does not read as input.

    Example:
        >>> rows = [{"text": str(i)} for i in range(40)]
        >>> [len(part) for part in divided(rows, evidence=True, held_out=None, seed=0)[:2]]
        [30, 10]
        >>> divided(rows, evidence=False, held_out=None, seed=0)[1:]
        (None, 'not wanted')
    """
    if not evidence:
        return data, None, "not wanted"
    if held_out is not None:
        return data, held_out, ""
    if data is None:
        return None, None, "no data was given"
    rows = resolve("neurograft.pipeline.rows.read_rows")(data)
    aid = "give labelled examples with --held-out FILE"
    if any({"positive", "negative"} <= row.keys() for row in rows):
        return rows, None, f"rows of positive and negative are no labelled examples; {aid}"
    count = min(MOST, len(rows) // SHARE)
    if count < LEAST:
        return rows, None, f"{len(rows)} examples are too few to keep a quarter back, at least {LEAST * SHARE}; {aid}"
    import torch

    from neurograft.core.seeds import generator

    alike: dict[str, list[int]] = {}  # examples of one input stay on one side
    for i, row in enumerate(rows):
        said = {*answers, "text"} if "audio" in row else answers
        alike.setdefault(repr([(k, row[k]) for k in sorted(row) if k not in said]), []).append(i)
    groups, kept = list(alike.values()), set[int]()
    for n in torch.randperm(len(groups), generator=generator(seed, "held out")).tolist():
        if len(kept) + len(groups[n]) <= count:
            kept.update(groups[n])
    if len(kept) < LEAST:
        return rows, None, f"{len(groups)} different examples are too few to keep a quarter back; {aid}"
    return [r for i, r in enumerate(rows) if i not in kept], [rows[i] for i in sorted(kept)], ""
