"""How much probability a model gives to a set of tokens, whatever it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.audits._changes import as_change
from neurograft.audits._measures import as_measure
from neurograft.audits._numbers import token_ids
from neurograft.audits._scoring import scored
from neurograft.audits._statistics import estimate
from neurograft.core.card import method
from neurograft.core.context import IGNORE, Batch
from neurograft.core.errors import RequestError

READINGS = ("mass", "largest", "logit")


@method(
    paper="lmm-skills",
    needs={"batches"},
    claims={"empty_is_zero"},
    departs="Teacher-forced by default, so that base and changed model are read at the same places; the paper lets "
    "each generate freely (forced=False), which changes the places that are averaged.",
)
def token_marginal(
    model: nn.Module,
    change: object,
    batches: Sequence[Batch],
    *,
    tokens: Any,
    forced: bool = True,
    length: int = 256,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure sum_{v in V} p(v), max_{v in V} p(v) and the largest logit on V: mean and maximum over the steps of a
    sample, then mean and spread over samples. The counting-bias probe is V = numbers.

    Args:
        model: the base, a causal language model.
        change: a graft, grafts, or a tuned model.
        batches: data; steps are the labelled places, or for forced=False what is generated after each row's prompt
            (the tokens before its first label, or the whole row).
        tokens: V: token numbers, or a tokenizer, whose numbers (digits, ordinals, English number words) are then V.
        forced: read along the data's answers; False generates greedily, raw logits read before any processor.
        length: tokens generated at most.
        level: of the interval, from a bootstrap over samples.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `measures`: "token_mass"; `base` and `changed`: for mass, largest and logit the mean and maximum over steps,
        each with the spread over samples; `tokens`, `samples`.
    """
    chosen = torch.tensor(token_ids(tokens))
    base, new = as_change(model, change).both(lambda net: _read(net, batches, chosen, forced, length))
    table = torch.stack([new["mass"][:, 0] - base["mass"][:, 0], torch.ones(len(base["mass"]))], 1).double()
    return {
        "measures": {
            "token_mass": as_measure(
                estimate(table, level=level, draws=draws, seed=seed, name="token_marginal"),
                unit="probability on the tokens",
                better="zero",
                base=float(base["mass"][:, 0].mean()),
                changed=float(new["mass"][:, 0].mean()),
            )
        },
        "base": _summary(base),
        "changed": _summary(new),
        "tokens": len(chosen),
        "samples": len(base["mass"]),
        "forced": forced,
    }


def _summary(found: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "mean": float(v[:, 0].mean()),
            "mean_spread": float(v[:, 0].std(correction=0)),
            "max": float(v[:, 1].mean()),
            "max_spread": float(v[:, 1].std(correction=0)),
        }
        for name, v in found.items()
    }


def _read(model: nn.Module, batches: Sequence[Batch], chosen: Tensor, forced: bool, length: int) -> dict[str, Tensor]:
    """Return for each reading the mean and maximum over the steps of each sample, [samples, 2]."""
    found: dict[str, list[Tensor]] = {name: [] for name in READINGS}
    for batch in batches:
        for logits in _forced(model, batch) if forced else _generated(model, batch, length):
            for name, values in readings(logits, chosen).items():
                found[name].append(torch.stack([values.mean(), values.max()]))
    if not found["mass"]:
        raise RequestError("no sample with a step", expected="data with labels or prompts", do="check the data")
    return {name: torch.stack(values).cpu() for name, values in found.items()}


def readings(logits: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Return mass, largest probability and largest logit on the chosen tokens at each step.

    Args:
        logits: [steps, V].
        chosen: token numbers.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 1.0]]).log()
        >>> [round(float(x), 3) for x in readings(logits, torch.tensor([2]))["mass"]]
        [1.0, 1.0]
    """
    wide = logits.detach().double()
    on = chosen.to(wide.device)
    p = wide.softmax(-1)[:, on]
    return {"mass": p.sum(-1), "largest": p.amax(-1), "logit": wide[:, on].amax(-1)}


def _forced(model: nn.Module, batch: Batch) -> list[Tensor]:
    found = scored(model, batch)
    rows = found.rows.to(found.logits.device)
    return [found.logits[rows == row] for row in range(found.size) if bool((rows == row).any())]


def _generated(model: nn.Module, batch: Batch, length: int) -> list[Tensor]:
    generate: Any = model.generate
    found = []
    for row in range(len(batch["input_ids"])):
        prompt = _prompt(batch, row)
        out = generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(torch.cat(out.logits))
    return found


def _prompt(batch: Batch, row: int) -> Tensor:
    tokens, keep = batch["input_ids"][row], torch.ones_like(batch["input_ids"][row], dtype=torch.bool)
    if batch.get("attention_mask") is not None:
        keep = batch["attention_mask"][row].bool()
    labels = batch.get("labels")
    if labels is not None and bool((labels[row][keep] == IGNORE).any()) and bool((labels[row] != IGNORE).any()):
        first = int((labels[row] != IGNORE).nonzero()[0])
        keep = keep & (torch.arange(len(tokens), device=tokens.device) < first)
    return tokens[keep][None]
