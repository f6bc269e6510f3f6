"""How much louder a model would say its word if one FFN neuron spoke up, read through the logit lens.

Shape letters: r prompts, k neurons, d features of the stream, V words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neurograft.anatomy.describe import anatomy
from neurograft.core.errors import RequestError
from neurograft.core.prompts.requests import Rows
from neurograft.core.units import Parameters, Site, Tap
from neurograft.edits._memory import Memory, picked

FLOOR = 1e-8
CHUNK = 1024  # neurons whose words are held at a time: words * neurons numbers are gigabytes in a large model


@torch.no_grad()
def amplified(model: nn.Module, memory: Memory, rows: Rows, *, gain: float = 30.0) -> Tensor:
    """Return log p(w | s + gain * a_i * W[:, i]) - log p(w | s) for every prompt and neuron, float32 [r, k].

    p reads the stream through final norm and head, the norm's divisor held at its value for the final stream; s is the
    stream before the FFN adds to it, a_i the neuron, both at the prompt's last token; w is the word the model says
    there. Probabilities are clipped at 1e-8 before the logarithm, what is no number counts 0.

    Args:
        model: a decoder with a head behind a final norm.
        memory: the FFN.
        rows: the prompts.
        gain: how much the neuron is amplified.

    Raises:
        RequestError: no head or no final norm was found.
    """
    head, scale, through = _lens(model)
    end = Site("end", "channel", memory.values.n, (), Tap(through, "input"))
    out = Site("out", "channel", memory.values.n, (), Tap(through, "output"))
    found = {"end": end, "out": out, **{s.name: s for s in (memory.keys, memory.values, memory.stream)}}
    seen = picked(model, found, rows, rows.last)
    final, centred = seen["end"], _centred(model.get_submodule(through), seen["end"])
    size = centred(final, 1).pow(2).mean(1).sqrt()  # [r], held as it is
    weight = _weight(head)
    word = head(seen["out"].to(weight.dtype)).argmax(-1)
    before = centred(seen[memory.stream.name] - seen[memory.values.name] - final, 1)
    start = head((seen["out"] + scale * before / size[:, None]).to(weight.dtype)).float()
    least = start.new_tensor(FLOOR).log()
    first = start.log_softmax(-1).gather(1, word[:, None]).clamp_min(least)[:, 0]
    columns = Parameters.of(model).by_name[memory.weight].detach()
    columns = columns.t() if memory.transposed else columns
    pushes = gain * seen[memory.keys.name] / size[:, None]  # [r, k]
    scores = torch.empty(len(start), memory.keys.n)
    for some in torch.arange(memory.keys.n, device=start.device).split(CHUNK):
        spoken = weight.detach().float() @ (scale[:, None] * centred(columns[:, some].float(), 0))  # [V, chunk]
        for i in range(len(start)):
            moved = start[i][:, None] + spoken * pushes[i, some]
            said = moved[word[i]] - moved.logsumexp(0)
            scores[i, some.cpu()] = (said.clamp_min(least) - first[i]).cpu()
    return scores.nan_to_num(0.0)


def _centred(norm: nn.Module, final: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return what a norm does before it scales: x minus its mean along an axis where a shift changes nothing, or x."""
    x = final[:1].to(next(norm.parameters()).dtype)
    here, shifted = norm(x), norm(x + x.float().pow(2).mean().sqrt().to(x))
    if float((here - shifted).float().norm()) > 0.1 * float(here.float().norm()):
        return lambda x, axis: x
    return lambda x, axis: x - x.mean(axis, keepdim=True)


def _lens(model: nn.Module) -> tuple[nn.Module, Tensor, str]:
    """Return the head, the final norm's gains [d], and its name."""
    known = anatomy(model)
    outer = [n for n in known.norms if not any(n.startswith(f"{layer}.") for layer in known.layers)]
    if known.head is None or not outer:
        raise RequestError(
            "a model without a head behind a final norm",
            expected="a decoder that reads its stream through both",
            do="use another edit, or mask='none'",
        )
    norm = model.get_submodule(outer[-1])
    gains = norm.weight.detach().float()  # type: ignore[union-attr, operator]
    return model.get_submodule(known.head), 1 + gains if outer[-1] in known.one_plus else gains, outer[-1]


def _weight(head: nn.Module) -> Tensor:
    found: Tensor = head.weight  # type: ignore[assignment]
    return found


def mask_of(
    scores: Tensor, *, general: tuple[float, float] = (0.3, 0.1), specific: tuple[float, float] = (0.3, 0.1)
) -> Tensor:
    """Return NMKE's mask from the scores of a batch's prompts [r, k]: neurons that help many, or one, of them.

    General score: in how many prompts a neuron's z-score is positive; specific score: its largest score. Shares
    rho = a + b * H^3 and a + b * H^2 of the neurons, H the entropies of how the scores are spread, over log k.

    Args:
        scores: S.
        general: a and b of the general share.
        specific: a and b of the specific share.

    Returns:
        bool [k]; ties at a cut all belong.
    """
    wide = scores.double()
    k = wide.shape[1]
    z = (wide - wide.mean(1, keepdim=True)) / wide.std(1, keepdim=True).clamp_min(1e-12)
    counts, largest = (z > 0).double().sum(0), wide.max(0).values
    soft = (30 * (wide - wide.max(1, keepdim=True).values)).softmax(1)
    positive = largest.clamp_min(0)
    shares = [
        general[0] + general[1] * float(_entropy(soft).mean()) ** 3,
        specific[0] + specific[1] * float(_entropy(positive / positive.sum().clamp_min(1e-12))) ** 2,
    ]
    assert k > 1
    cuts = [torch.quantile(v, 1 - share) for v, share in zip((counts, largest), shares)]
    return (counts >= cuts[0]) | (largest >= cuts[1])


def _entropy(p: Tensor) -> Tensor:
    logs = torch.log(torch.tensor(float(p.shape[-1]), dtype=p.dtype))
    return -torch.xlogy(p, p).sum(-1) / logs
