"""Where in the layers the change reaches the output's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.anatomy.describe import anatomy
from neurograft.audits._changes import as_change, evaluating
from neurograft.core.card import method
from neurograft.core.context import IGNORE, Batch, shifts, token_mask
from neurograft.core.errors import RequestError, RunError
from neurograft.core.taps.look import look
from neurograft.core.units import Parameters

CHUNK = 1 << 22


@method(
    paper="lmm-skills",
    needs={"batches"},
    claims={"empty_is_zero"},
    departs="H_t a_t - H_b a_b is summed over the vocabulary in float64 chunks; the paper's script avoids that axis by "
    "Gram matrices, which in float32 return 0 for small differences.",
)
def layer_contribution(model: nn.Module, change: object, batches: Sequence[Batch]) -> dict[str, Any]:
    """Measure ||H_t a_t - H_b a_b||_2 for what each layer's attention and FFN add to the residual stream.

    a is the sub-layer's output before it joins the residual, H the model's own unembedding (no final norm), t the
    changed model, b the base; mean over answer tokens, then over samples.

    Args:
        model: the base, a language model with an output head.
        change: a graft, grafts, or a tuned model.
        batches: data; the places that predict a label count, or every token if there are no labels.

    Returns:
        `layers`: for each its name and, by role ("attention", "ffn", ...), the drift in logit space; `largest`: the
        layer and role that moved most, None if nothing moved.

    Raises:
        RequestError: a model without a head, or no batches.
    """
    made, known = as_change(model, change), anatomy(model)
    if known.head is None or not batches:
        raise RequestError(
            "a model without an output head" if known.head is None else "no batches",
            expected="a language model with a head, and data",
            do="load the ForCausalLM class" if known.head is None else "give data with at least one row",
        )
    modules = list(dict.fromkeys(m for branch in known.branches for m in branch.values()))
    totals, samples = dict.fromkeys(modules, 0.0), 0
    with evaluating(model, made.tuned):
        head = _head(model, known.head)
        if Parameters.of(model).alias[f"{known.head}.weight"] in made.weights:
            head = head.clone()  # the change is written over it
        for batch in batches:
            base = _outputs(model, modules, batch)
            with made.on() as changed:
                new, new_head = _outputs(changed, modules, batch), _head(changed, known.head).clone()
            place = _places(model, batch)
            rows = place.nonzero()[:, 0].cpu()
            for name in modules:
                size = drift(new[name][place], base[name][place], new_head, head).cpu()
                sums = torch.zeros(len(place), dtype=torch.float64).index_add_(0, rows, size)
                counts = torch.bincount(rows, minlength=len(place))
                totals[name] += float((sums / counts.clamp(min=1)).sum())
            samples += int((torch.bincount(rows, minlength=len(place)) > 0).sum())
    found = {name: total / max(1, samples) for name, total in totals.items()}
    layers = [
        {"name": layer, **{role: found[module] for role, module in branch.items()}}
        for layer, branch in zip(known.layers, known.branches)
    ]
    most = max(found, key=lambda name: found[name])
    return {"layers": layers, "largest": most if found[most] > 0 else None, "samples": samples}


def drift(new: Tensor, base: Tensor, new_head: Tensor, base_head: Tensor) -> Tensor:
    """Return ||H_t a_t - H_b a_b||_2 for each token, float64 [N].

    Args:
        new: a_t [N, d]. base: a_b [N, d]. new_head: H_t [V, d]. base_head: H_b [V, d].

    Example:
        >>> one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 3.0]])
        >>> drift(two, one, torch.eye(2), torch.eye(2)).tolist()
        [3.0]
    """
    a, b = new.double(), base.double()
    same = torch.equal(new_head, base_head)
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    step = max(1, CHUNK // max(1, len(a)))
    for first in range(0, len(base_head), step):
        h, g = new_head[first : first + step].double(), base_head[first : first + step].double()
        total += ((a - b) @ h.t() if same else a @ h.t() - b @ g.t()).square().sum(1)
    return total.sqrt()


def _head(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _places(model: nn.Module, batch: Batch) -> Tensor:
    labels, mask = batch.get("labels"), token_mask(batch)
    assert mask is not None
    if labels is None or labels.shape != mask.shape:
        return mask
    found = labels != IGNORE
    if shifts(model):
        found = torch.cat([found[:, 1:], torch.zeros_like(found[:, :1])], 1)
    return found & mask


def _outputs(model: nn.Module, modules: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = (output if isinstance(output, Tensor) else output[0]).detach()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        look(model, batch, hooked=modules)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in modules if name not in found]
    if silent:
        raise RunError(f"no output passed {silent[0]!r}; its contribution cannot be compared")
    return found
