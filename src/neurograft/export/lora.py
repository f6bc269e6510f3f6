"""A graft as a PEFT LoRA adapter: exact one-hot factors that stock PEFT, transformers and LoRA servers load."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.skeleton import skeleton
from neurograft.export._changes import Touched, base_model, base_name, place, tied_names, touched
from neurograft.export._factors import Factors, factors, mismatches
from neurograft.export._readme import readme


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
        listed = "; ".join(f"{name}: {why}" for name, why in list(found.unfit.items())[:6])
        more = f" and {len(found.unfit) - 6} more" if len(found.unfit) > 6 else ""
        raise RequestError(
            f"{len(found.unfit)} changes with no exact LoRA form ({listed}{more})",
            expected="rows, columns, low-rank changes, experts, embedding rows, biases of adapted layers",
            do="export to='merged', ship the graft itself, or pass partial=True to leave these out",
        )
    if not (found.layers or found.banks or found.tokens or found.heads):
        raise RequestError("a graft without any exact LoRA form", expected="at least one", do="export to='merged'")
    config, tensors = _config(found, *base_name(graft, model, base)), _tensors(found, model)
    folder = place(folder)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    notes = {
        "Rounding": f"{found.mismatches} of {found.numel} numbers differ from the graft's after merging in "
        f"{found.dtype} (base + difference rounds elsewhere); unmerged outputs differ by rounding.",
        "Left out": "\n".join(f"- `{n}`: {why}" for n, why in found.unfit.items()) or "Nothing.",
    }
    (folder / "README.md").write_text(readme(graft, base_name(graft, model, base)[0], "lora", notes))
    return folder


@dataclass
class Found:
    """What of a graft goes where in a LoRA adapter."""

    layers: dict[str, tuple[Touched, Factors]] = field(default_factory=dict)
    banks: dict[str, tuple[Touched, Factors]] = field(default_factory=dict)
    biases: dict[str, Touched] = field(default_factory=dict)
    tokens: dict[str, Touched] = field(default_factory=dict)
    heads: dict[str, nn.Module] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    new: dict[str, Touched] = field(default_factory=dict)
    mismatches: int = 0
    numel: int = 0
    dtype: str = ""

    @staticmethod
    def of(graft: Graft, model: nn.Module) -> Found:
        """Sort a graft's changes."""
        found, biases = Found(), []
        for item in touched(graft, model):
            found.dtype = str(item.weight.dtype).removeprefix("torch.")
            if item.new:
                found.new[item.name] = item
                found.heads[item.module] = item.owner
            elif tied_names(model, item.name):
                found.unfit[item.name] = "tied weights; an adapter would change one of their uses"
            elif item.leaf == "bias" and isinstance(item.owner, (nn.Linear, Conv1D, nn.Conv2d)):
                biases.append(item)
            else:
                found._weight(item)
        found._take_biases(biases)
        for item, made in (*found.layers.values(), *found.banks.values()):
            found.mismatches += mismatches(item, made, narrow=item.name in found.banks)
        for item in found.biases.values():
            found.mismatches += sum(item.mismatches(change, s) for change, s in item.members)
        kept = [i for i, _ in (*found.layers.values(), *found.banks.values())]
        # Token rows are replaced, not added to: they cannot mismatch.
        for item in (*kept, *found.biases.values(), *found.tokens.values()):
            found.numel += sum(change.region.numel for change, _ in item.members)
        return found

    def _weight(self, item: Touched) -> None:
        owner, dim = item.owner, item.weight.dim()
        if isinstance(owner, nn.Embedding):
            rows = len(item.members) == 1 and item.members[0][0].region.layout == "rows"
            if rows:
                self.tokens[item.name] = item
            else:
                self.unfit[item.name] = "a change of an embedding that is not whole rows"
            return
        plain = isinstance(owner, (nn.Linear, Conv1D)) and item.leaf == "weight"
        filters = isinstance(owner, nn.Conv2d) and owner.groups == 1
        bank = dim == 3 and not isinstance(owner, nn.modules.conv._ConvNd)
        if not (plain or filters or bank):
            self.unfit[item.name] = "a norm, bias or other parameter that LoRA has no factors for"
            return
        made = factors(item)
        if isinstance(made, str):
            self.unfit[item.name] = made
        elif filters and not all(c.region.layout == "rows" for c, _ in item.members):
            self.unfit[item.name] = "a change of a convolution that is not whole filters"
        else:
            (self.banks if bank else self.layers)[item.name] = (item, made)

    def _take_biases(self, biases: list[Touched]) -> None:
        """Biases fit if every adapted layer has one: `lora_bias` is one switch for all of them."""
        owners = [item.owner for item, _ in self.layers.values()] + [item.owner for item in biases]
        fits = bool(biases) and not self.banks and all(o.bias is not None for o in owners)
        for item in biases:
            if fits:
                self.biases[item.name] = item
            else:
                self.unfit[item.name] = "a bias, while some adapted layer has none (or experts are adapted too)"

    def ranks(self) -> dict[str, int]:
        """Return the rank of every adapted module or expert bank, by full name."""
        ranks = {i.module: sum(P.shape[1] for P, _ in f[0]) for i, f in self.layers.values()}
        ranks |= {i.module: ranks.get(i.module, 1) for i in self.biases.values()}
        per_bank = {
            n: max(sum(P.shape[1] for P, _ in pairs) for pairs in f.values()) for n, (_, f) in self.banks.items()
        }
        return ranks | per_bank


def _config(found: Found, base: str | None, revision: str | None) -> LoraConfig:
    ranks = found.ranks()
    tokens = {i.module: i.members[0][0].region.ids.tolist() for i in found.tokens.values()}
    modules = sorted({i.module for i, _ in found.layers.values()} | {i.module for i in found.biases.values()})
    conv1d = any(isinstance(i.owner, Conv1D) for i, _ in found.layers.values())
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
    conv1d = isinstance(layer.get_base_layer(), Conv1D)
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
