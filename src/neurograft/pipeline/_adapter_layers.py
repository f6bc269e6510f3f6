"""A LoRA's layers as changes of the base's tensors: low-rank, or whole where PEFT trains them whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.coordinates import Coordinates, everything
from neurograft.core.grafts.delta import Delta, LowRank, New, Slice
from neurograft.core.region import Region, as_matrix
from neurograft.pipeline._adapter_files import PLAIN
from neurograft.pipeline._narrow import narrow_change
from neurograft.pipeline._sources import Source

ROOT = "base_model.model."


def only_lora(wrapped: Any, config: Any) -> bool:
    """Say whether the adapter is one plain LoRA, whose product is the whole change."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in wrapped.modules() if isinstance(m, BaseTunerLayer)]
    if any(getattr(m, "merged", False) for m in layers):
        raise RequestError("a merged PeftModel", expected="an unmerged one", do="call unmerge_adapter() first")
    plain = config.peft_type.value == "LORA" and getattr(config, "init_lora_weights", True) in PLAIN
    named = all(getattr(m, "lora_variant", None) in (None, {}) for m in layers)
    plain = plain and not (getattr(config, "lora_bias", False) and config.bias != "none")  # two changes of one bias
    return plain and named and len(wrapped.peft_config) == 1 and not getattr(config, "alora_invocation_tokens", None)


def lora_changes(
    wrapped: Any, source: Source, where: Coordinates, *, biases: bool
) -> tuple[dict[str, Delta], dict[str, str]]:
    """Return a LoRA's changes by checkpoint tensor, trained biases of the base too, and digests of the tensors."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    adapter = next(iter(wrapped.peft_config))
    found: dict[str, Delta] = {}
    for path, layer in wrapped.named_modules():
        name = path.removeprefix(ROOT).replace(".base_layer", "")
        if isinstance(layer, ParamWrapper):
            found |= _bank(f"{name}.{layer.parameter_name}", layer, adapter, where)
        elif isinstance(layer, LoraLayer) and adapter in layer.scaling:
            found |= _linear(name, layer, adapter, source, where)
        elif isinstance(layer, TrainableTokensLayer):
            found |= _tokens(name.removesuffix(".token_adapter"), layer, adapter, where)
        elif isinstance(layer, ModulesToSaveWrapper):
            for leaf, tensor in layer.modules_to_save[adapter].state_dict().items():
                found |= _whole(f"{name}.{leaf}", tensor, source, where)
    for path, parameter in wrapped.named_parameters() if biases else ():
        name = path.removeprefix(ROOT)
        own = not any(part in name for part in ("lora_", "modules_to_save", "original_module"))
        if own and name.endswith(".bias") and not parameter.is_meta:  # what the file lacks is as in the base
            found |= _whole(name.replace(".base_layer", ""), parameter.detach(), source, where)
    digests = {n: tensor_digest(source.known[n][0]()) for n, d in found.items() if not isinstance(d, New)}
    return found, digests


def _linear(name: str, layer: Any, adapter: str, source: Source, where: Coordinates) -> dict[str, Delta]:
    owner, scale = layer.get_base_layer(), float(layer.scaling[adapter])
    shape = tuple(owner.weight.shape)
    if adapter in getattr(layer, "lora_embedding_A", {}):
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        low, bias = LowRank(shape, _number(A), _number(B), scale, transposed=True), None
    else:
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        A, B = down.weight.reshape(down.weight.shape[0], -1), up.weight.reshape(up.weight.shape[0], -1)
        low = LowRank(shape, _number(A), _number(B), scale, transposed=bool(getattr(layer, "fan_in_fan_out", False)))
        bias = up.bias
    (piece,) = where.to_checkpoint(f"{name}.weight", everything(shape, as_matrix(shape)))
    found: dict[str, Delta] = {piece.name: low}
    if bias is not None:
        (piece,) = where.to_checkpoint(f"{name}.bias", everything((shape[0],), as_matrix((shape[0],))))
        before = source.known[piece.name][0]().float()
        found[piece.name] = Slice(
            everything(tuple(before.shape), as_matrix(tuple(before.shape))), before + scale * _number(bias)
        )
    return found


def _bank(name: str, layer: Any, adapter: str, where: Coordinates) -> dict[str, Delta]:
    """A bank of experts: one low-rank change for each tensor the checkpoint holds of it."""
    P, Q, scale = layer.get_delta_factors(adapter)
    if layer.num_experts == 1:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        P, Q, scale = B[None], A[None], float(layer.scaling[adapter])
    P, Q = _number(P), _number(Q)
    shape = tuple(layer.get_param().shape)
    _, rows, columns = as_matrix(shape)
    found: dict[str, Delta] = {}
    for piece in where.to_checkpoint(name, everything(shape, as_matrix(shape))):
        if piece.order is None and len(P) == 1:
            found[piece.name] = LowRank(shape, Q[0], P[0], float(scale))
        elif isinstance(piece.order, slice) and piece.order.start % columns == 0 and len(piece.region.shape) == 2:
            e, first = divmod(piece.order.start // columns, rows)
            part = P[e, first : first + piece.region.shape[0]]
            found[piece.name] = LowRank(piece.region.shape, Q[e].clone(), part.clone(), float(scale))
        else:
            raise RequestError(
                f"a LoRA on {name}, whose experts the checkpoint stores as {piece.name}",
                expected="experts that are tensors of their own in the checkpoint",
                do="merge the adapter and give the merged model's folder",
            )
    return found


def _tokens(name: str, layer: Any, adapter: str, where: Coordinates) -> dict[str, Delta]:
    shape = tuple(layer.get_base_layer().weight.shape)
    ids, order = torch.tensor(layer.token_indices[adapter]).sort()
    (piece,) = where.to_checkpoint(f"{name}.weight", Region.of(shape, "rows", ids))
    return {piece.name: Slice(piece.region, _number(layer.trainable_tokens_delta[adapter])[order])}


def _whole(name: str, tensor: Tensor, source: Source, where: Coordinates) -> dict[str, Delta]:
    shape = tuple(tensor.shape)
    (piece,) = where.to_checkpoint(name, everything(shape, as_matrix(shape)))
    if piece.name not in source.known:
        return {piece.name: New(_number(tensor))}
    change = narrow_change(source.known[piece.name][0](), tensor, as_matrix(shape))
    return {} if change is None else {piece.name: change}


def _number(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
