"""An adapter of PEFT as a folder: its config, its tensors, and a README that says what is not as in the graft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from neurograft.core.grafts.graft import Graft
from neurograft.export._changes import place
from neurograft.export._readme import readme

SHOWN = 6


def listed(unfit: Mapping[str, str]) -> str:
    """Return the first of the changes that do not fit, each with its reason, for a message.

    Example:
        >>> listed({"norm": "no factors", "head": "tied"})
        'norm: no factors; head: tied'
    """
    more = f" and {len(unfit) - SHOWN} more" if len(unfit) > SHOWN else ""
    return "; ".join(f"{name}: {why}" for name, why in list(unfit.items())[:SHOWN]) + more


def write_adapter(
    graft: Graft,
    folder: Path,
    config: Any,
    tensors: dict[str, Tensor],
    *,
    form: str,
    rounding: str,
    unfit: Mapping[str, str],
) -> Path:
    """Write a new folder with an adapter in it, and return it.

    Args:
        graft: what the adapter was made of.
        folder: a new or empty folder.
        config: the adapter's `PeftConfig`, which names the base.
        tensors: the adapter's tensors under PEFT's names.
        form: the format's name.
        rounding: how many numbers differ from the graft's, and why.
        unfit: what was left out -> the reason.

    Raises:
        RequestError: the folder holds something.
    """
    folder = place(folder)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    left_out = "\n".join(f"- `{name}`: {why}" for name, why in unfit.items()) or "Nothing."
    notes = {"Rounding": rounding, "Left out": left_out}
    (folder / "README.md").write_text(readme(graft, config.base_model_name_or_path, form, notes))
    return folder
