"""What the verbs take: data in any form and its processor, as examples or as batches on the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neurograft.core.context import Batch, device_of
from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import digest
from neurograft.core.prompts.collate import collator
from neurograft.core.prompts.examples import size
from neurograft.pipeline._hub import cut_off
from neurograft.pipeline._media import unpadded
from neurograft.pipeline._usable import check
from neurograft.pipeline.encode import encode, is_ready
from neurograft.pipeline.rows import Row, read_rows

PROCESSORS = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def processor_for(model: nn.Module, processing_class: Any = None) -> Any:
    """Return the processor to encode raw data with: the one given, one by name, or the one saved with the model.

    Args:
        model: its `config.name_or_path` says where it came from.
        processing_class: a tokenizer, processor, image processor or feature extractor; or a path or Hub id.

    Returns:
        A processor, or None if none is known.

    Raises:
        RequestError: a name under which no processor is found, or files of one that cannot be read.
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
    failed: Exception | None = None
    for kind, options in tries:
        try:
            return kind.from_pretrained(str(name), **options)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            failed = failed or error
    there = next((file for file in PROCESSORS if _has(name, file)), None)
    if there is not None:
        raise RequestError(
            f"{Path(name) / there}, which cannot be read ({str(failed).splitlines()[0] if str(failed) else failed!r})",
            expected="the file as its processor saved it",
            do="save the tokenizer or processor beside the model again",
        ) from failed
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
        batch_size: examples in a batch; sounds of several lengths take more batches where padding would change them.
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
    device = device_of(model)
    rows = read_rows(data, limit=None if _maybe_batches(data) else limit)
    if all(is_batch(row) for row in rows):
        made: list[Batch] = []
        for i, row in enumerate(rows):
            if limit is not None and sum(size(b) for b in made) >= limit:
                break
            batch = {k: v for k, v in row.items() if isinstance(v, Tensor) or k == "return_dict"}
            check(batch, model, i)
            made.append(batch)
    else:
        examples = as_dataset(
            rows, model, processing_class=processing_class, max_length=max_length, limit=limit, seed=seed
        )
        join = collator(model, processing_class)
        chunks = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        made = [join(part) for chunk in chunks for part in unpadded(chunk, model)]
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


def _maybe_batches(data: Any) -> bool:
    return not isinstance(data, (str, Path))


def _unbatched(batch: Row) -> list[Row]:
    n = size(batch)
    return [{k: v[i] for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and len(v) == n} for i in range(n)]


def data_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return a digest of batches or examples, for cards and for keeping locating and testing apart.

    Example:
        >>> data_digest([{"x": torch.ones(2)}]) == data_digest([{"x": torch.ones(2)}])
        True
    """
    return digest(*[digest({k: v for k, v in b.items() if isinstance(v, Tensor)}) for b in batches])
