"""Models by path or Hub id, in the class their own config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from neurograft.core.errors import RequestError, extra, one_of
from neurograft.core.resolve import resolve
from neurograft.core.seeds import seeded
from neurograft.pipeline._configs import SHIPPED, class_of, config_of

Model = nn.Module | str | Path
DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_model(
    model: Model,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    head: str | None = None,
    num_labels: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a live model as it is, or load one by path, Hub id or the name of a shipped model.

    Args:
        model: a module, a folder with a config.json, a Hub id, or "atlas".
        revision: of a Hub id.
        dtype: of the weights; as saved if None.
        device_map: as for `from_pretrained`.
        head: load with this new head instead of the saved class, e.g. "SequenceClassification"; its weights are
            drawn anew from `seed` and belong into `new=`.
        num_labels: classes of that head.
        seed: names the numbers of a new head.

    Raises:
        RequestError: no such model, an unknown class or dtype, weights that the files lack, or options that
            mean nothing for a live model.
    """
    if isinstance(model, nn.Module):
        given = {"revision": revision, "dtype": dtype, "device_map": device_map, "head": head}
        odd = [k for k, v in given.items() if v is not None]
        if odd:
            raise RequestError(
                f"{', '.join(odd)} with a live model", expected="a path or Hub id with them", do="leave them out"
            )
        return model
    name = str(model)
    if not name:
        raise RequestError("an empty name for a model", expected="a model folder or a Hub id", do="name one")
    if name in SHIPPED and not Path(name).exists():
        name = str(resolve(SHIPPED[name])())
    if revision is not None and Path(name).is_dir():
        raise RequestError(
            f"revision {revision!r} of the folder {name}",
            expected="a Hub id with it",
            do="leave it out",
        )
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    config = config_of(name, options)
    if isinstance(config, dict):
        return _diffusers(name, config, options, dtype)
    factory = class_of(config, name, head)
    if num_labels is not None:
        config.num_labels = num_labels
    options |= {"config": config, "dtype": as_dtype(dtype) or "auto"}
    with seeded(seed, "new head"):
        made, missing = _read(factory, name, device_map, options)
    if missing and head is None:
        raise RequestError(
            f"{name}, whose files lack {', '.join(missing[:4])}",
            expected=f"all weights of a {type(made).__name__}",
            do="name the head that is to be drawn anew: head='SequenceClassification'",
        )
    return made.eval()


def _read(factory: Any, name: str, device_map: Any, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """Return a model with its weights, and the names of those that its files lack."""
    placed = {} if device_map is None else {"device_map": device_map}
    try:
        made, report = factory.from_pretrained(
            name, **options, **placed, use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise RequestError(
            f"the model {name!r}, whose weights cannot be read ({error})",
            expected="safetensors files",
            do="save it with save_pretrained; pickled weights are never read",
        ) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        if "mismatched" in str(error):
            raise RequestError(
                f"the model {name!r}, whose weights have other shapes than its config says",
                expected="weights and a config of one model",
                do="copy or download both again",
            ) from error
        if device_map is None:
            raise
        raise RequestError(
            f"device_map {device_map!r} ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            expected="devices of this machine, as device_map of from_pretrained",
            do="use 'cpu' or 'auto'",
        ) from error
    return made, sorted(report.get("missing_keys", ()))


def model_name(model: Model) -> str:
    """Return what a card calls a model: its class, or the path or Hub id it was given by."""
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a torch dtype by its name.

    Raises:
        RequestError: an unknown name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found: torch.dtype = getattr(torch, one_of(str(dtype).removeprefix("torch."), DTYPES, what="dtype"))
    return found


def _diffusers(name: str, config: dict[str, Any], options: dict[str, Any], dtype: Any) -> nn.Module:
    with extra("diffusers", what=f"{name}, a {config['_class_name']},"):
        import diffusers
    factory = getattr(diffusers, one_of(config["_class_name"], dir(diffusers), what="diffusers class"))
    made: nn.Module = factory.from_pretrained(name, torch_dtype=as_dtype(dtype), use_safetensors=True, **options)
    return made.eval()
