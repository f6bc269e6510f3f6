"""PEFT adapters where they lie: telling them, and putting them on a model without numbers or on the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.grafts.skeleton import skeleton
from neurograft.pipeline.models import Model

PLAIN = (True, False, "gaussian", "eva", "orthogonal")  # ways to start that leave the base as it is


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


def adapter_folder(tuned: Model, revision: str | None) -> Path:
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


def wrapped_in(model: nn.Module, folder: Path) -> nn.Module:
    """Return the adapter on a copy of the model that has no numbers of its own."""
    from peft import PeftConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise no_weights(str(config.peft_type.value))
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


def no_weights(kind: str) -> RequestError:
    """Return the error for an adapter that is no change of weights."""
    return RequestError(
        f"an adapter of type {kind}, which changes no weight",
        expected="an adapter that can be merged",
        do="tune the base anew with another method",
    )


def merged_with(numbers: nn.Module, tuned: nn.Module | Path | str) -> nn.Module:
    """Return a copy of the base with the adapter merged into its weights."""
    from peft import PeftModel

    if isinstance(tuned, nn.Module):
        made: Any = copy.deepcopy(tuned)
    else:
        made = PeftModel.from_pretrained(copy.deepcopy(numbers), str(tuned), use_safetensors=True)  # type: ignore[arg-type]
    merged: nn.Module = made.merge_and_unload()
    return merged
