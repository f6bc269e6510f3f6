"""A graft of scattered entries as a PEFT Supertuning adapter: flat entry numbers and what is added there."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.supertuning import SupertuningConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from neurograft.core.card import method
from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.skeleton import skeleton
from neurograft.export._adapter import listed, write_adapter
from neurograft.export._changes import Touched, base_model, base_name, tied_names, touched

LIMIT = 1 << 31


@method(claims={"coordinates"})
def supertuning(
    graft: Graft,
    folder: Path,
    *,
    model: nn.Module | None = None,
    partial: bool = False,
    base: str | None = None,
) -> Path:
    """Write the entries a graft changes in linear layers as a Supertuning adapter of stock PEFT.

    Supertuning gives every layer the same share of its entries: the largest share that is needed, the rest
    padded with entries to which 0 is added.

    Args:
        graft: the graft.
        folder: a new or empty folder.
        model: the base; without it the base named on the card is loaded.
        partial: write what fits and leave the rest out, listed in the README, instead of raising.
        base: name or path of the base for the adapter's config; the model's own name if None.

    Returns:
        The folder, with `adapter_config.json`, `adapter_model.safetensors` and a README.

    Raises:
        RequestError: something is not a change of entries of a linear layer.
    """
    model = base_model(graft, model)
    items = list(touched(graft, model))
    unfit = {item.name: why for item in items if (why := _unfit(item, model))}
    found = {item.name: item for item in items if item.name not in unfit}
    if (unfit and not partial) or not found:
        raise RequestError(
            f"{len(unfit)} changes that Supertuning cannot hold ({listed(unfit)})",
            expected="chosen entries of linear layers",
            do="export to='lora' or 'merged', or pass partial=True to leave these out",
        )
    name, revision = base_name(graft, model, base)
    config = SupertuningConfig(
        target_modules=sorted(i.module for i in found.values()),
        sparsity=_sparsity(found),
        inference_mode=True,
        base_model_name_or_path=name,
        revision=revision,
    )
    tensors, wrong, total = _tensors(found, model, config.sparsity)
    return write_adapter(
        graft,
        folder,
        config,
        tensors,
        form="supertuning",
        rounding=f"{wrong} of {total} numbers differ from the graft's: PEFT rounds the difference to the base's "
        "dtype and adds it.",
        unfit=unfit,
    )


def _unfit(item: Touched, model: nn.Module) -> str:
    if item.new:
        return "a parameter the base lacks"
    if tied_names(model, item.name):
        return "tied weights; an adapter would change one of their uses"
    if not isinstance(item.owner, nn.Linear) or item.leaf != "weight":
        return "no weight of a linear layer"
    if not all(isinstance(c, Slice) and c.region.layout != "all" for c, _ in item.members):
        return "a change of the whole weight"
    return "" if item.weight.numel() < LIMIT else "a weight of 2^31 entries or more"


def _sparsity(found: dict[str, Touched]) -> float:
    """Return the largest sparsity whose share holds every layer's entries, rounded as PEFT rounds."""
    needed = [(i.weight.numel(), sum(c.region.numel for c, _ in i.members)) for i in found.values()]
    sparsity = 1.0 - max(k / numel for numel, k in needed)
    while any(int(numel * (1 - sparsity)) < max(1, k) for numel, k in needed):
        sparsity -= 1e-7
    return max(sparsity, 0.0)


def _tensors(found: dict[str, Touched], model: nn.Module, sparsity: float) -> tuple[dict[str, Tensor], int, int]:
    """Return the adapter's tensors under PEFT's names, how many numbers round elsewhere, and of how many."""
    made, wrong, total = {}, 0, 0
    for item in found.values():
        entries, added = [], []
        for change, s in item.members:
            difference, before = item.difference(change, s), item.before(change.region)
            now = item.after(change, s).to(before.dtype)
            wrong += int((before + difference.to(before.dtype) != now).sum())
            total += change.region.numel
            entries.append(change.region.flat().cpu())
            added.append(difference.reshape(-1).float())
        flat, values = torch.cat(entries), torch.cat(added)
        pad = int(item.weight.numel() * (1 - sparsity)) - len(flat)
        taken = torch.zeros(item.weight.numel(), dtype=torch.bool).index_fill_(0, flat, True)
        spare = (~taken).nonzero().reshape(-1)[:pad]
        path = f"base_model.model.{item.module}"
        made[f"{path}.supertuning_indices"] = torch.cat([flat, spare]).to(torch.int32)
        made[f"{path}.supertuning_values"] = torch.cat([values, torch.zeros(pad)])
    config = SupertuningConfig(target_modules=[i.module for i in found.values()], sparsity=sparsity)
    expected = get_peft_model_state_dict(get_peft_model(skeleton(model), config), save_embedding_layers=False)
    if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in made.items()}:
        raise RequestError(
            "an adapter that this version of PEFT lays out in another way",
            expected=", ".join(sorted(expected)[:2]),
            do="report the version of PEFT; export to='merged' meanwhile",
        )
    return made, wrong, total
