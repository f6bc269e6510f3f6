"""Models by path or Hub id, in the class their own config names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from neurograft.core.errors import RequestError, extra, near, one_of
from neurograft.core.resolve import resolve
from neurograft.core.seeds import seeded
from neurograft.pipeline._hub import cut_off

Model = nn.Module | str | Path
SHIPPED = {"atlas": "neurograft.worlds.atlas.path"}
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
    if device_map is not None:
        options["device_map"] = device_map
    options |= {"dtype": as_dtype(dtype) or "auto", "use_safetensors": True, "output_loading_info": True}
    try:
        with seeded(seed, "new head"):
            made, report = factory.from_pretrained(name, config=config, **options)
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
    missing = sorted(report.get("missing_keys", ()))
    if missing and head is None:
        raise RequestError(
            f"{name}, whose files lack {', '.join(missing[:4])}",
            expected=f"all weights of a {type(made).__name__}",
            do="name the head that is to be drawn anew: head='SequenceClassification'",
        )
    loaded: nn.Module = made.eval()
    return loaded


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


def config_of(name: str, options: dict[str, Any]) -> Any:
    """Return a model's config by path or Hub id: one of transformers, or the plain text of one of diffusers.

    Raises:
        RequestError: no model is there.
    """
    path = Path(name)
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            grafted = "; a graft's folder stands behind its base" if (path / "graft.json").is_file() else ""
            raise RequestError(
                f"the folder {name}", expected="a model: a config.json in it", do=f"check the path{grafted}"
            )
        try:
            text = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(
                f"{file}, which is no JSON ({error})", expected="a model's config", do="copy or download it again"
            ) from error
        if not isinstance(text, dict):
            raise RequestError(
                f"{file}, a JSON {type(text).__name__}", expected="a model's config", do="copy or download it again"
            )
        if "_class_name" in text:
            return text
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise RequestError(
            f"the model {name!r}, where no folder is",
            expected="a model folder or a Hub id",
            do=f"check the path; {near(path.name, beside)}" if beside else "check the path",
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if not path.is_dir() and cut_off(name):
            raise OSError("no connection to the Hub, and nothing of it in the cache")
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        if path.is_dir():
            raise RequestError(
                f"the model {name!r} of type {text.get('model_type')!r}, which transformers cannot read ({error})",
                expected="a config of an architecture that this version of transformers knows",
                do="mend the config, install the version that defines it, or pass the live model: its anatomy is then"
                " found by dataflow",
            ) from error
        beside = [*SHIPPED, *(p.name for p in Path().iterdir() if (p / "config.json").is_file())]
        raise RequestError(
            f"the model {name!r}, neither a folder nor a reachable Hub model",
            expected="a model folder, a Hub id or a shipped model",
            do=f"check the name and the connection; {near(name, beside)}",
        ) from error


def class_of(config: Any, name: str, head: str | None) -> Any:
    """Return the class of transformers that a config names, or the one with the wanted head.

    Raises:
        RequestError: it names none, or the head is unknown.
    """
    import transformers

    if head is not None:
        suffix = head.removeprefix("AutoModelFor").replace("-", " ").title().replace(" ", "") if "-" in head else head
        known = [n for n in dir(transformers) if n.startswith("AutoModelFor")]
        wanted = suffix if suffix.startswith("AutoModelFor") else f"AutoModelFor{suffix}"
        return getattr(transformers, one_of(wanted, known, what="head"))
    named = getattr(config, "architectures", None) or []
    factory = getattr(transformers, named[0], None) if named else None
    if factory is None:
        raise RequestError(
            f"{name}, whose config names {'the class ' + named[0] if named else 'no class'}",
            expected="`architectures` in config.json, with a class of transformers",
            do="load the model yourself and pass it live, or name a head",
        )
    return factory


def _diffusers(name: str, config: dict[str, Any], options: dict[str, Any], dtype: Any) -> nn.Module:
    with extra("diffusers", what=f"{name}, a {config['_class_name']},"):
        import diffusers
    factory = getattr(diffusers, one_of(config["_class_name"], dir(diffusers), what="diffusers class"))
    made: nn.Module = factory.from_pretrained(name, torch_dtype=as_dtype(dtype), use_safetensors=True, **options)
    return made.eval()
