"""PEFT adapters as grafts: LoRA as low-rank changes, saved modules and tokens as they are, the rest merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import tensor_digest
from neurograft.core.grafts.coordinates import Coordinates
from neurograft.core.grafts.delta import Delta
from neurograft.core.grafts.graft import Graft
from neurograft.core.grafts.origin import versions
from neurograft.core.region import as_matrix
from neurograft.pipeline._adapter_files import adapter_folder, merged_with, no_weights, wrapped_in
from neurograft.pipeline._adapter_layers import lora_changes, only_lora
from neurograft.pipeline._narrow import narrow_change
from neurograft.pipeline._sources import Source, live
from neurograft.pipeline.models import Model, load_model, model_name


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
    source_folder = None if isinstance(tuned, nn.Module) else adapter_folder(tuned, revision)
    wrapped = tuned if source_folder is None else wrapped_in(model, source_folder)
    config: Any = next(iter(wrapped.peft_config.values()))  # type: ignore[union-attr, operator]
    if source_folder is not None:
        config = PeftConfig.from_pretrained(str(source_folder))
    kind = str(config.peft_type.value)
    card = {
        "base": base,
        "versions": versions(),
        "made_by": "diff",
        "tuned": model_name(tuned),
        "peft_type": kind,
    }
    if config.is_prompt_learning or kind in ("ADAPTION_PROMPT", "CARTRIDGE"):
        raise no_weights(kind)
    if only_lora(wrapped, config):
        deltas, digests = lora_changes(wrapped, source, where, biases=getattr(config, "bias", "none") != "none")
    else:
        numbers = model if folder is None else load_model(str(folder))
        deltas, digests = _merged_changes(merged_with(numbers, source_folder or tuned), source, where)
    return Graft(dict(sorted(deltas.items())), (), digests, card)


def _merged_changes(merged: nn.Module, source: Source, where: Coordinates) -> tuple[dict[str, Delta], dict[str, str]]:
    """Return where a merged model differs from the base, and digests of these tensors in the base."""
    deltas: dict[str, Delta] = {}
    digests: dict[str, str] = {}
    theirs = live(merged, where, below=False)
    for name, readers in source.known.items():
        before = readers[0]()
        change = narrow_change(before, theirs.known[name][0](), as_matrix(tuple(before.shape)))
        if change is not None:
            deltas[name], digests[name] = change, tensor_digest(before)
    return deltas, digests
