"""PEFT adapters as grafts: LoRA as low-rank changes, saved modules and tokens as they are, the rest merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.coordinates import Coordinates, everything
from neurograft.core.grafts.delta import Delta, LowRank, New, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.origin import versions
from neurograft.core.grafts.skeleton import skeleton
from neurograft.core.region import Region, as_matrix
from neurograft.pipeline._narrow import narrow_change
from neurograft.pipeline._sources import Source, live
from neurograft.pipeline.models import Model, load_model

PLAIN = (True, False, "gaussian", "eva", "orthogonal")  # ways to start that leave the base as it is
ROOT = "base_model.model."


def is_adapter(tuned: Model, revision: str | None) -> bool:
    """Say whether something is a PEFT adapter: a PeftModel, or where an adapter_config.json lies."""
    if isinstance(tuned, nn.Module):
        from peft import PeftModel

        return isinstance(tuned, PeftModel)
    name = str(tuned)
    if Path(name).is_dir():
        return (Path(name) / "adapter_config.json").is_file()
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return False
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return file_exists(name, "adapter_config.json", revision=revision)
    except (HfHubHTTPError, HFValidationError, OSError):
        return False


def adapter_graft(
    model: nn.Module,
    source: Source,
    where: Coordinates,
    tuned: Model,
    revision: str | None,
    folder: Path | None,
    base: dict[str, Any],
) -> Graft:
    """Return the graft that an adapter is.

    Args:
        model: the base, with or without its numbers.
        source: the base's tensors.
        where: the base's coordinates.
        tuned: a PeftModel, or the adapter's folder or Hub id.
        revision: of the adapter.
        folder: where the base's files lie, if it is not live.
        base: what the card says of the base.

    Raises:
        RequestError: the adapter is pickled, holds prompts, is merged already, or does not fit the base.
    """
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise RequestError(
            "a base that carries adapter layers",
            expected="the plain base",
            do="pass its path, or a model loaded without the adapter",
        )
    source_folder = None if isinstance(tuned, nn.Module) else _folder(tuned, revision)
    wrapped = tuned if source_folder is None else _wrapped(model, source_folder)
    config: Any = next(iter(wrapped.peft_config.values()))  # type: ignore[union-attr, operator]
    if source_folder is not None:
        config = PeftConfig.from_pretrained(str(source_folder))
    kind = str(config.peft_type.value)
    card = {
        "base": base,
        "versions": versions(),
        "made_by": "diff",
        "tuned": _name(tuned),
        "peft_type": kind,
    }
    if config.is_prompt_learning or kind in ("ADAPTION_PROMPT", "CARTRIDGE"):
        raise _no_weights(kind)
    if _only_lora(wrapped, config):
        deltas, digests = _layers(wrapped, source, where, biases=getattr(config, "bias", "none") != "none")
        return Graft(dict(sorted(deltas.items())), (), digests, card)
    numbers = model if folder is None else load_model(str(folder))
    merged = _merged(numbers, source_folder or tuned)
    deltas, digests = {}, {}
    theirs = live(merged, where, below=False)
    for name, readers in source.known.items():
        before = readers[0]()
        change = narrow_change(before, theirs.known[name][0](), as_matrix(tuple(before.shape)))
        if change is not None:
            deltas[name], digests[name] = change, tensor_digest(before)
    return Graft(dict(sorted(deltas.items())), (), digests, card)


def _name(tuned: Model) -> str:
    return type(tuned).__name__ if isinstance(tuned, nn.Module) else str(tuned)


def _folder(tuned: Model, revision: str | None) -> Path:
    """Return the local folder of an adapter, with safetensors in it."""
    folder = Path(str(tuned))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(tuned), revision=revision, allow_patterns=["adapter_*"]))
    if not (folder / "adapter_model.safetensors").is_file():
        raise RequestError(
            f"the adapter {folder} without adapter_model.safetensors",
            expected="safetensors; pickled adapters are never read",
            do="save it again with save_pretrained of PEFT",
        )
    return folder


def _wrapped(model: nn.Module, folder: Path) -> nn.Module:
    """Return the adapter on a copy of the model that has no numbers of its own."""
    from peft import PeftConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise _no_weights(str(config.peft_type.value))
    empty = skeleton(model)
    config.base_model_name_or_path, config.inference_mode = empty.__dict__.get("name_or_path"), False
    if getattr(config, "init_lora_weights", True) not in PLAIN:
        config.init_lora_weights = True  # the way it started; here the numbers come from the file
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
        made: nn.Module = get_peft_model(empty, config)  # type: ignore[arg-type]
        expected = get_peft_model_state_dict(made, save_embedding_layers=False)
        odd = sorted(n for n in expected if n not in tensors or tensors[n].shape != expected[n].shape)
        if odd:
            raise ValueError(f"tensor {odd[0]} is missing or has another shape")
        # Not through PEFT's own loader, which moves what it loads to the device of the (empty) base.
        inside = {name: _in_file(name) for name in made.state_dict()}
        made.load_state_dict({n: tensors[f] for n, f in inside.items() if f in expected}, strict=False, assign=True)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise RequestError(
            f"the adapter {folder}, which does not fit a {type(model).__name__} ({str(error).splitlines()[0]})",
            expected="a complete adapter of this base",
            do="give the base it was trained on, or download it again",
        ) from error
    return made


def _in_file(name: str) -> str:
    """Return the name a tensor of the adapter "default" has in an adapter's file."""
    return name.replace(".modules_to_save.default", "").replace(".default.", ".").removesuffix(".default")


def _no_weights(kind: str) -> RequestError:
    return RequestError(
        f"an adapter of type {kind}, which changes no weight",
        expected="an adapter that can be merged",
        do="tune the base anew with another method",
    )


def _merged(numbers: nn.Module, tuned: nn.Module | Path | str) -> nn.Module:
    from peft import PeftModel

    if isinstance(tuned, nn.Module):
        made: Any = copy.deepcopy(tuned)
    else:
        made = PeftModel.from_pretrained(copy.deepcopy(numbers), str(tuned), use_safetensors=True)  # type: ignore[arg-type]
    merged: nn.Module = made.merge_and_unload()
    return merged


def _only_lora(wrapped: Any, config: Any) -> bool:
    """Say whether the adapter is one plain LoRA, whose product is the whole change."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in wrapped.modules() if isinstance(m, BaseTunerLayer)]
    if any(getattr(m, "merged", False) for m in layers):
        raise RequestError("a merged PeftModel", expected="an unmerged one", do="call unmerge_adapter() first")
    plain = config.peft_type.value == "LORA" and getattr(config, "init_lora_weights", True) in PLAIN
    named = all(getattr(m, "lora_variant", None) in (None, {}) for m in layers)
    plain = plain and not (getattr(config, "lora_bias", False) and config.bias != "none")  # two changes of one bias
    return plain and named and len(wrapped.peft_config) == 1 and not getattr(config, "alora_invocation_tokens", None)


def _layers(
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
