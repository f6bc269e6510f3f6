"""A graft as a PEFT LoRA adapter: exact one-hot factors that stock PEFT, transformers and LoRA servers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.skeleton import skeleton
from neurograft.core.linears import transposed
from neurograft.export._adapter import listed, write_adapter
from neurograft.export._changes import Touched, base_model, base_name
from neurograft.export._factors import Factors
from neurograft.export._places import Found


@method(claims={"coordinates"})
def lora(
    graft: Graft,
    folder: Path,
    *,
    model: nn.Module | None = None,
    partial: bool = False,
    base: str | None = None,
) -> Path:
    """Write the graft as a LoRA adapter whose product is the change: k rows or columns are a rank-k LoRA.

    Rows: B one-hot [out, k], A = values - base [k, in]. Columns: A one-hot, B = (values - base).T. Experts of a
    fused bank go through `target_parameters`, embedding rows through `trainable_token_indices`, biases of
    adapted layers through `lora_bias` where every adapted layer has one, new heads through `modules_to_save`.

    Args:
        graft: the graft.
        folder: a new or empty folder.
        model: the base; without it the base named on the card is loaded.
        partial: write what fits and leave the rest out, listed in the README, instead of raising.
        base: name or path of the base for the adapter's config; the model's own name if None.

    Returns:
        The folder, with `adapter_config.json`, `adapter_model.safetensors` and a README that counts the numbers
        which base + difference rounds elsewhere than the graft does.

    Raises:
        RequestError: something has no exact LoRA form (norms, scattered entries, whole weights, tied weights).
    """
    model = base_model(graft, model)
    found = Found.of(graft, model)
    if found.unfit and not partial:
        raise RequestError(
            f"{len(found.unfit)} changes with no exact LoRA form ({listed(found.unfit)})",
            expected="rows, columns, low-rank changes, experts, embedding rows, biases of adapted layers",
            do="export to='merged', ship the graft itself, or pass partial=True to leave these out",
        )
    if not (found.layers or found.banks or found.tokens or found.heads):
        raise RequestError("a graft without any exact LoRA form", expected="at least one", do="export to='merged'")
    return write_adapter(
        graft,
        folder,
        _config(found, *base_name(graft, model, base)),
        _tensors(found, model),
        form="lora",
        rounding=f"{found.mismatches} of {found.numel} numbers differ from the graft's after merging in {found.dtype} "
        "(base + difference rounds elsewhere); unmerged outputs differ by rounding.",
        unfit=found.unfit,
    )


def _config(found: Found, base: str | None, revision: str | None) -> LoraConfig:
    ranks = found.ranks()
    tokens = {i.module: i.members[0][0].region.ids.tolist() for i in found.tokens.values()}
    modules = sorted({i.module for i, _ in found.layers.values()} | {i.module for i in found.biases.values()})
    conv1d = any(transposed(i.owner) for i, _ in found.layers.values())
    return LoraConfig(
        r=max(ranks.values(), default=1),
        lora_alpha=max(ranks.values(), default=1),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=modules,
        target_parameters=sorted(found.banks) or None,
        trainable_token_indices=tokens or None,
        modules_to_save=sorted(found.heads) or None,
        lora_bias=bool(found.biases),
        fan_in_fan_out=conv1d,
        lora_dropout=0.0,
        inference_mode=True,
        base_model_name_or_path=base,
        revision=revision,
    )


def _tensors(found: Found, model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors under the names PEFT gives them, learned by wrapping an empty copy of the model."""
    empty = skeleton(model)
    config = _config(found, None, None)
    config.inference_mode = False
    wrapped = get_peft_model(empty, config)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    made: dict[str, Tensor] = {}
    for path, layer in wrapped.named_modules():
        if isinstance(layer, ParamWrapper):
            made |= _bank(path, layer, *found.banks[f"{_bare(path)}.{layer.parameter_name}"])
        elif isinstance(layer, LoraLayer):
            made |= _layer(path, layer, found)
    for item in found.tokens.values():
        change, s = item.members[0]
        made[f"base_model.model.{item.module}.token_adapter.trainable_tokens_delta"] = item.after(change, s)
    for module, owner in found.heads.items():
        for leaf, tensor in owner.state_dict().items():
            head = found.new.get(f"{module}.{leaf}")
            value = tensor if head is None else head.after(*head.members[0]).reshape(tensor.shape)
            made[f"base_model.model.{module}.{leaf}"] = value.float().clone()
    wrong = [n for n in expected.keys() | made.keys() if n not in made or n not in expected]
    wrong += [n for n in made.keys() & expected.keys() if made[n].shape != expected[n].shape]
    if wrong:
        raise RequestError(
            f"an adapter that PEFT lays out in another way (tensor {sorted(wrong)[0]})",
            expected=f"{len(expected)} tensors as this version of PEFT makes them",
            do="report the model and the version of PEFT; export to='merged' meanwhile",
        )
    return {n: t.contiguous() for n, t in made.items()}


def _bare(path: str) -> str:
    """Return the module's own name without what PEFT adds."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def _layer(path: str, layer: Any, found: Found) -> dict[str, Tensor]:
    name = _bare(path)
    made = found.layers[f"{name}.weight"][1] if f"{name}.weight" in found.layers else {}
    weight = layer.get_base_layer().weight
    conv1d = transposed(layer.get_base_layer())
    shape = (weight.shape[0], weight[0].numel())
    pairs = made.get(0) or [(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))]
    P, Q = torch.cat([p for p, _ in pairs], 1), torch.cat([q for _, q in pairs], 0)
    A, B = (P.t(), Q.t()) if conv1d else (Q, P)
    if weight.dim() == 4:
        A, B = A.reshape(-1, *weight.shape[1:]), B[:, :, None, None]
    out = {f"{path}.lora_A.weight": A.float(), f"{path}.lora_B.weight": B.float()}
    if found.biases:
        bias = torch.zeros(B.shape[0])
        held = found.biases.get(f"{name}.bias")
        if held is not None:
            for change, s in held.members:
                bias[change.region.flat().cpu()] = held.difference(change, s).reshape(-1).float()
        out[f"{path}.lora_B.bias"] = bias
    return out


def _bank(path: str, layer: Any, item: Touched, made: Factors) -> dict[str, Tensor]:
    """A bank's factors: A is [experts x r, in], experts first; B is [out, r x experts], ranks first."""
    (experts, rows, columns), r = tuple(item.weight.shape), layer.r["default"]
    P, Q = torch.zeros(experts, rows, r), torch.zeros(experts, r, columns)
    for e, pairs in made.items():
        p, q = torch.cat([p for p, _ in pairs], 1), torch.cat([q for _, q in pairs], 0)
        P[e, :, : p.shape[1]], Q[e, : q.shape[0]] = p, q
    if not layer._did_swap_in_out_features:  # stored as [experts, in, out]
        P, Q = Q.transpose(1, 2), P.transpose(1, 2)
    A, B = Q.reshape(experts * r, -1), P.permute(1, 2, 0).reshape(P.shape[1], r * experts)
    return {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
