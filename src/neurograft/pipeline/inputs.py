"""What the verbs take: data in any form and its processor, as examples or as batches on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.context import IGNORE, Batch, shifts
from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import digest
from neurograft.pipeline._hub import cut_off
from neurograft.pipeline.encode import encode, is_ready
from neurograft.pipeline.rows import Row, read_rows

CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)


def processor_for(model: nn.Module, processing_class: Any = None) -> Any:
    """Return the processor to encode raw data with: the one given, one by name, or the one saved with the model.

    Args:
        model: its `config.name_or_path` says where it came from.
        processing_class: a tokenizer, processor, image processor or feature extractor; or a path or Hub id.

    Returns:
        A processor, or None if none is known.

    Raises:
        RequestError: a name under which no processor is found.
    """
    if processing_class is not None and not isinstance(processing_class, (str, Path)):
        return processing_class
    name = processing_class or getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if not name:
        return None
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    tries: list[tuple[Any, dict[str, Any]]] = [(AutoTokenizer, {}), (AutoImageProcessor, {"backend": "pil"})]
    tries += [(AutoFeatureExtractor, {})]
    if _has(name, "processor_config.json"):
        tries.insert(0, (AutoProcessor, {}))
    if not Path(name).is_dir() and cut_off(str(name), file="tokenizer_config.json"):
        tries = []
    for kind, options in tries:
        try:
            return kind.from_pretrained(str(name), **options)
        except (OSError, ValueError, ImportError, KeyError, TypeError):
            continue
    if processing_class is not None:
        raise RequestError(
            f"processing_class={str(name)!r}", expected="a saved tokenizer or processor", do="check the path"
        )
    return None


def _has(name: str | Path, file: str) -> bool:
    return (Path(name) / file).is_file()


def as_dataset(
    data: Any,
    model: nn.Module,
    *,
    processing_class: Any = None,
    max_length: int = 1024,
    limit: int | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Return data as encoded, unbatched examples, labels included where the rows have them.

    Args:
        data: anything `read_rows` takes; ready batches are cut into their examples.
        model: the model they are for.
        processing_class: see `processor_for`; looked up only if the rows are raw.
        max_length: longer texts are cut.
        limit: use at most so many examples.
        seed: names the masks of masked language modelling.

    Raises:
        RequestError: empty data, unknown columns, numbers that are not finite, tokens outside the vocabulary.
    """
    if max_length < 1:
        raise RequestError(f"max_length={max_length}", expected="at least 1", do="give max_length=1024")
    rows = read_rows(data, limit=None if _maybe_batches(data) else limit)
    if all(is_batch(row) for row in rows):
        rows = [example for row in rows for example in _unbatched(row)]
    rows = rows[:limit]
    processor = None if all(is_ready(row) for row in rows) else processor_for(model, processing_class)
    examples = [encode(row, model, processor, max_length=max_length, index=i, seed=seed) for i, row in enumerate(rows)]
    for i, example in enumerate(examples):
        check(example, model, i)
    return examples


def as_batches(
    data: Any,
    model: nn.Module,
    *,
    processing_class: Any = None,
    batch_size: int = 8,
    max_length: int = 1024,
    limit: int | None = None,
    seed: int = 0,
) -> list[Batch]:
    """Return data as batches of model inputs on the model's device, in the order given; ready batches stay whole.

    Args:
        data: anything `read_rows` takes.
        model: the model they are for.
        processing_class: see `processor_for`.
        batch_size: examples in a batch.
        max_length: longer texts are cut.
        limit: use at most so many examples (of ready batches: so many batches as hold them).
        seed: names the masks of masked language modelling.

    Raises:
        RequestError: as `as_dataset`, or batches of no example.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size={batch_size}", expected="at least 1", do="give batch_size=8")
    if limit is not None and limit < 1:
        raise RequestError(f"limit={limit}", expected="at least 1", do="leave it out")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows = read_rows(data, limit=None if _maybe_batches(data) else limit)
    if all(is_batch(row) for row in rows):
        made: list[Batch] = []
        for i, row in enumerate(rows):
            if limit is not None and sum(size_of(b) for b in made) >= limit:
                break
            batch = {k: v for k, v in row.items() if isinstance(v, Tensor) or k == "return_dict"}
            check(batch, model, i)
            made.append(batch)
    else:
        examples = as_dataset(
            rows, model, processing_class=processing_class, max_length=max_length, limit=limit, seed=seed
        )
        join = collator(model, processing_class)
        made = [join(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]
    return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for b in made]


def is_batch(row: Row) -> bool:
    """Say whether a row is a ready batch: its input tensor has a batch axis, and its labels, if any, are several."""
    labels = row.get("labels")
    if labels is not None and not (isinstance(labels, Tensor) and labels.dim()):
        return False  # several answers of a multiple choice stand side by side in one row
    least = {"input_ids": 2, "inputs_embeds": 3, "pixel_values": 4, "input_values": 2, "input_features": 3}
    # A denoiser's `hidden_states` may be images or sequences; what it is told is always a sequence.
    least |= {"decoder_input_ids": 2, "sample": 4, "states": 3, "encoder_hidden_states": 3, "hidden_states": 3}
    for name, dims in least.items():
        if isinstance(row.get(name), Tensor):
            return int(row[name].dim()) >= dims
    return False


def size_of(batch: Mapping[str, Any]) -> int:
    """Return how many examples a batch holds."""
    return next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim())


def _maybe_batches(data: Any) -> bool:
    return not isinstance(data, (str, Path))


def _unbatched(batch: Row) -> list[Row]:
    n = size_of(batch)
    return [{k: v[i] for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and len(v) == n} for i in range(n)]


def collator(
    model: nn.Module, processing_class: Any = None
) -> Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]:
    """Return what joins encoded examples into a batch: tokens padded on the right, labels with -100, the rest with 0.

    Args:
        model: its config names the padding token.
        processing_class: its padding token, if the config has none.
    """
    config = getattr(model, "config", None)
    known = [getattr(config, "pad_token_id", None)]
    known.append(getattr(getattr(processing_class, "tokenizer", processing_class), "pad_token_id", None))
    eos = getattr(config, "eos_token_id", None)
    known.append(eos[0] if isinstance(eos, list) else eos)
    pad = next((int(p) for p in known if p is not None), 0)

    def join(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        keys = examples[0].keys()
        odd = next((e.keys() ^ keys for e in examples if e.keys() != keys), None)
        if odd:
            raise RequestError(
                f"examples of one batch that differ in {', '.join(sorted(odd))}",
                expected="the same columns in every row",
                do="fill the column in, or split the data",
            )
        fill = {k: IGNORE if k == "labels" else pad if k.endswith("input_ids") else 0 for k in keys}
        made = {k: _stacked(k, [e[k] for e in examples], fill[k]) for k in keys}
        if "input_ids" in made and "attention_mask" not in made and made["input_ids"].dim() == 2:
            lengths = torch.tensor([len(e["input_ids"]) for e in examples])
            made["attention_mask"] = (torch.arange(made["input_ids"].shape[1]) < lengths[:, None]).long()
        return made

    return join


def _stacked(name: str, values: list[Tensor], pad: int) -> Tensor:
    if len({tuple(v.shape) for v in values}) == 1:
        return torch.stack(values)
    if any(v.dim() != values[0].dim() for v in values) or any(v.shape[1:] != values[0].shape[1:] for v in values):
        raise RequestError(
            f"{name} of shapes {sorted({tuple(v.shape) for v in values})[:4]} in one batch",
            expected="shapes that differ only in their first axis",
            do="bring the inputs to one size",
        )
    fill = 0.0 if values[0].is_floating_point() else pad
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


def check(example: Mapping[str, Any], model: nn.Module, index: int) -> None:
    """Raise if numbers are not finite, or tokens or labels lie outside of what the model knows.

    Raises:
        RequestError: naming the row.
    """
    for name, value in example.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise RequestError(
                f"{name} of row {index} with numbers that are not finite", expected="finite inputs", do="clean the data"
            )
    tokens = example.get("input_ids")
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    size: int = getattr(text, "vocab_size", None) or 0
    for token in _extremes(tokens) if size else ():
        if not 0 <= token < size:
            raise RequestError(
                f"token {token} in row {index} for a vocabulary of {size}",
                expected="this model's own tokenizer",
                do="encode with the tokenizer saved beside the model",
            )
    labels, kind = example.get("labels"), type(model).__name__
    beside = shifts(model) or kind.endswith(("ForMaskedLM", "ForTokenClassification"))  # a label for every token
    if beside and isinstance(tokens, Tensor) and isinstance(labels, Tensor) and tokens.shape != labels.shape:
        raise RequestError(
            f"labels of shape {tuple(labels.shape)} beside tokens of shape {tuple(tokens.shape)} in row {index}",
            expected="a label for every token",
            do=f"fill up with {IGNORE}, which stands for none",
        )
    known = size if shifts(model) or kind.endswith("ForMaskedLM") else 0
    if kind.endswith(CLASSIFIERS) and getattr(config, "problem_type", None) in (None, "single_label_classification"):
        known = int(getattr(config, "num_labels", 1))  # 1 for numbers instead of classes
    for label in _extremes(labels, but=IGNORE) if known > 1 else ():
        if not 0 <= label < known:
            raise RequestError(
                f"the label {label} of row {index}",
                expected=f"a number from 0 to {known - 1}, or {IGNORE} for none",
                do="number the labels anew, or load the model with num_labels= as many as there are",
            )


def _extremes(numbers: Any, *, but: int | None = None) -> tuple[int, ...]:
    """Return the least and the largest of whole numbers, one of them left out."""
    if not isinstance(numbers, Tensor) or numbers.is_floating_point():
        return ()
    kept = numbers if but is None else numbers[numbers != but]
    return (int(kept.min()), int(kept.max())) if kept.numel() else ()


def data_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return a digest of batches or examples, for cards and for keeping locating and testing apart.

    Example:
        >>> data_digest([{"x": torch.ones(2)}]) == data_digest([{"x": torch.ones(2)}])
        True
    """
    return digest(*[digest({k: v for k, v in b.items() if isinstance(v, Tensor)}) for b in batches])
