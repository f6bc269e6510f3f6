"""Which describer describes: one that was given or saved, tokens for texts, words or captions taught on scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from neurograft.core.context import Batch
from neurograft.core.errors import RequestError
from neurograft.core.taps.describe import Describer, TokenWords
from neurograft.networks.captioner import captioner
from neurograft.networks.saved import load_describer
from neurograft.networks.word_scorer import word_scorer
from neurograft.worlds.scenes import scenes

NAMES = ("tokens", "words", "captions")


def describer_for(
    batches: Sequence[Batch], choice: Any = None, *, pairs: Any = None, processor: Any = None, seed: int = 0
) -> Describer:
    """Return what describes the units of a model that reads these batches.

    Args:
        batches: the data.
        choice: a describer; the folder of a saved one; "tokens"; "words" or "captions", taught here; None for tokens
            where the data are texts and words where they are images.
        pairs: exemplar sets with descriptions to teach words or captions on; synthetic scenes of the images' size if
            None.
        processor: whose tokenizer names the tokens; their numbers if None.
        seed: names the scenes and the training.

    Raises:
        RequestError: an unknown choice, or one that does not go with the data.
    """
    if choice is not None and not isinstance(choice, (str, Path)):
        return choice
    text = bool(batches) and "input_ids" in batches[0]
    name = str(choice or ("tokens" if text else "words"))
    if name not in NAMES:
        if not (Path(name) / "describer.json").is_file():
            raise RequestError(
                f"the describer {name!r}", expected=f"one of {', '.join(NAMES)}, or the folder of one", do="check it"
            )
        return load_describer(name)
    if (name == "tokens") != text or not (text or "pixel_values" in batches[0]):
        raise RequestError(
            f"the describer {name!r} for examples of {', '.join(batches[0])}",
            expected="tokens for texts, words or captions for images",
            do="leave describer out",
        )
    if name == "tokens":
        return TokenWords(batches, token_words(processor))
    if pairs is None:
        pixels: Tensor = batches[0]["pixel_values"]
        pairs = scenes(size=min(int(pixels.shape[-1]), 64), channels=int(pixels.shape[-3]), seed=seed)
    return word_scorer(pairs) if name == "words" else captioner(pairs, seed=seed)


def token_words(processor: Any) -> Callable[[int], str]:
    """Return token id -> text by a processor's tokenizer, or its number if there is none."""
    decode = getattr(getattr(processor, "tokenizer", processor), "decode", None)
    return str if decode is None else lambda token: str(decode([token]))
