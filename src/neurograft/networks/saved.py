"""Describers as folders: `describer.json` and `describer.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from neurograft.core.errors import RequestError
from neurograft.networks._regions import regions
from neurograft.networks.captioner import Captioner
from neurograft.networks.word_scorer import WordScorer

FORMAT = 1
HAND, OWN = "regions", "own"


def save_describer(describer: WordScorer | Captioner, folder: str | Path) -> Path:
    """Write a word scorer or captioner into a new folder; an encoder of its own is not written.

    Args:
        describer: what to save.
        folder: made if it is not there.

    Raises:
        RequestError: another kind of describer, or a folder that holds one already.
    """
    if not isinstance(describer, (WordScorer, Captioner)):
        raise RequestError(
            f"a describer of type {type(describer).__name__}", expected="a WordScorer or Captioner", do="keep its data"
        )
    path = Path(folder)
    if (path / "describer.json").exists():
        raise RequestError(f"{path}, which holds a describer", expected="a new folder", do="choose another name")
    path.mkdir(parents=True, exist_ok=True)
    captions = isinstance(describer, Captioner)
    shape = describer.shape if isinstance(describer, Captioner) else {"width": describer.score.in_features // 2}
    text: dict[str, Any] = {
        "format": FORMAT,
        "kind": "captions" if captions else "words",
        "words": describer.words,
        "encoder": HAND if describer.encode is regions else OWN,
        "shape": shape,
    }
    save_file({k: v.contiguous() for k, v in describer.state_dict().items()}, path / "describer.safetensors")
    (path / "describer.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return path


def load_describer(folder: str | Path, *, encode: Any = None) -> WordScorer | Captioner:
    """Read what `save_describer` wrote.

    Args:
        folder: the folder.
        encode: its encoder, where it had one of its own.

    Raises:
        RequestError: no describer, a newer format, or an encoder that is missing.

    Example:
        >>> import tempfile
        >>> from neurograft.networks.word_scorer import word_scorer
        >>> from neurograft.worlds.scenes import scenes
        >>> made = word_scorer(scenes(count=30, k=2, size=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     load_describer(save_describer(made, folder)).identity == made.identity
        True
    """
    path = Path(folder)
    if not (path / "describer.json").is_file():
        raise RequestError(f"the describer {path}", expected="a folder with describer.json", do="check the path")
    text = json.loads((path / "describer.json").read_text(encoding="utf-8"))
    if text.get("format") != FORMAT:
        raise RequestError(f"{path} of format {text.get('format')}", expected=f"format {FORMAT}", do="save it again")
    if text["encoder"] == OWN and encode is None:
        raise RequestError(f"{path} without its encoder", expected="encode=", do="load_describer(folder, encode=...)")
    kind: Any = Captioner if text["kind"] == "captions" else WordScorer
    with torch.random.fork_rng(devices=[]):
        made: WordScorer | Captioner = kind(text["words"], encode=encode or regions, **text["shape"])
    made.load_state_dict(load_file(path / "describer.safetensors"))
    return made.eval().requires_grad_(False)
