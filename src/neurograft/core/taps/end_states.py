"""What units hold where a prompt ends: their means, what those restore of an answer, and what they write.

Shape letters: N rows, n units of a site, w features of a unit, k chosen units, d residual channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.batches import IGNORE, Batch
from neurograft.core.errors import RequestError, one_of
from neurograft.core.intervene import Intervention
from neurograft.core.prompts.candidates import first_answers
from neurograft.core.running import run
from neurograft.core.selection import Scores, Selection
from neurograft.core.taps.board import features
from neurograft.core.taps.instructed import need_ahead, prompt_end
from neurograft.core.taps.stream import means
from neurograft.core.units import Site

MEASURES, HEADS = ("probability", "nll"), 10  # the paper's number of heads


def end_means(model: nn.Module, sites: Mapping[str, Site], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the mean of every unit over the last prompt tokens, float32 [n] or [n, w] for each site.

    Args:
        model: run as it is, without gradients.
        sites: what to read; each needs a tap.
        batches: labelled rows.

    Raises:
        RequestError: no batches, or a row without an answer behind a prompt.
    """
    if not batches:
        raise RequestError("no batches", expected="prompts with labelled answers", do="give prompt/completion rows")
    return means(model, sites, batches, mask=prompt_end)


@torch.no_grad()
def answer_scores(model: nn.Module, batches: Sequence[Batch], measure: str = "probability") -> Tensor:
    """Return how well a model expects each row's answer, float64 [N]; higher is better.

    Args:
        model: as it is to be asked.
        batches: labelled rows.
        measure: "probability" of the answer's first token, or "nll", minus the mean negative log-likelihood of its
            tokens.

    Raises:
        RequestError: an unknown measure, no batches, a row without an answer behind a prompt, a model that does not
            predict the token ahead.
    """
    one_of(measure, MEASURES, what="measure of an answer")
    need_ahead(model)
    if not batches:
        raise RequestError("no batches", expected="prompts with labelled answers", do="give prompt/completion rows")
    found = []
    for batch in batches:
        at, first = first_answers(batch)
        logits = run(model, batch).logits[:, -batch["labels"].shape[1] :]
        if measure == "probability":
            rows = torch.arange(len(at), device=logits.device)
            told = logits[rows, at - 1].float().softmax(-1).gather(1, first[:, None])[:, 0]
        else:
            marks = batch["labels"][:, 1:] != IGNORE
            logp = logits[:, :-1].float().log_softmax(-1)
            each = logp.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
            told = (each * marks).sum(1) / marks.sum(1)
        found.append(told.double().cpu())
    return torch.cat(found)


def effects(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Sequence[Batch],
    values: Mapping[str, Tensor],
    *,
    measure: str = "probability",
) -> dict[str, Tensor]:
    """Return what each unit alone restores of the answers, float64 [n] for each site; one run for each unit and batch.

    effect_u = mean over rows of score(answer | a_u = value_u at the last prompt token) - score(answer).

    Args:
        model: left as it is.
        sites: whose units are replaced, one at a time.
        batches: prompts that lack the instruction, labelled with the instructed answers.
        values: site name -> what each unit is replaced by, [n] or [n, w].
        measure: see `answer_scores`.
    """
    plain = answer_scores(model, batches, measure)
    found = {}
    for name, site in sites.items():
        gains = torch.zeros(site.n, dtype=torch.float64)
        for unit in range(site.n):
            one = Intervention(site, torch.tensor([unit]), "replace", values[name][unit : unit + 1], prompt_end)
            mounted = one.mount(model)
            try:
                gains[unit] = (answer_scores(model, batches, measure) - plain).mean()
            finally:
                mounted.remove()
        found[name] = gains
    return found


@torch.no_grad()
def written(model: nn.Module, site: Site, ids: Tensor, values: Tensor) -> Tensor:
    """Return what units add to the output of the projection they enter, sum over u of W_o[:, u] value_u, float32 [d].

    Args:
        model: its projection is applied; a bias is left out.
        site: units tapped where they enter a linear map, such as attention heads.
        ids: chosen units, int64 [k].
        values: their activations, [k] or [k, w].

    Raises:
        RequestError: the units enter no linear map.
    """
    tap = site.tap
    module: Any = None if tap is None or tap.side != "input" else model.get_submodule(tap.module)
    weight = getattr(module, "weight", None)
    if tap is None or weight is None or not len(ids):
        raise RequestError(
            f"what {len(ids)} units of {site.name!r} write",
            expected="units that enter a linear map, such as heads",
            do="use units='head'",
        )
    size = int(getattr(module, "in_features", weight.shape[0]))
    x = torch.zeros(2, size, device=weight.device, dtype=weight.dtype if weight.is_floating_point() else None)
    places = features(tap, site.n)[ids].reshape(-1).to(x.device)
    x[0, places] = values.reshape(-1).to(x)
    out: Tensor = module(x)
    return (out[0] - out[1]).float().cpu()


def best(scores: Scores, count: int | None = None) -> Selection:
    """Return the best heads: `count` of them, or 10, or all of a model that has fewer.

    Raises:
        RequestError: a count of more heads than there are.
    """
    return scores.top(count=min(HEADS, sum(s.n for s in scores.sites.values())) if count is None else count)


def joint(model: nn.Module, heads: Selection, values: Mapping[str, Tensor]) -> Tensor:
    """Return theta = sum over the heads of W_o^h hbar_h, float32 [d].

    Args:
        model: its output projections are read.
        heads: which.
        values: site name -> activations of all its units, [n] or [n, w].
    """
    parts = [written(model, heads.sites[n], ids, values[n][ids]) for n, ids in heads.ids.items() if len(ids)]
    return torch.stack(parts).sum(0)
