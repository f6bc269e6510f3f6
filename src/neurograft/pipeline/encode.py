"""From rows as people write them to what a model takes, one example at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.pipeline._columns import as_tensor, labelled, need
from neurograft.pipeline._media import heard, pictured
from neurograft.pipeline._texts import chat, completed, plain_text, some, tokens_of, translated
from neurograft.pipeline.grouped import COLUMN

READY = (
    "input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "decoder_input_ids",
    "sample", "states", "hidden_states",
)  # fmt: skip
COLUMNS = "text | text+label | prompt+completion | messages | source+target | image+label | audio+label|text"


def is_ready(row: Mapping[str, Any]) -> bool:
    """Say whether a row holds tensors for the model already."""
    return any(k in row for k in READY)


def encode(
    row: Mapping[str, Any], model: nn.Module, processor: Any, *, max_length: int, index: int, seed: int = 0
) -> dict[str, Tensor]:
    """Return one example as the model's inputs, unbatched tensors, labels included where the row has them.

    Args:
        row: columns as in `COLUMNS`, or the model's own inputs; a column `group` says where a row belongs.
        model: the model.
        processor: tokenizer, image processor or feature extractor; None for ready rows.
        max_length: longer texts are cut on the right.
        index: the row's number, for messages and for the masks of masked language modelling.
        seed: names the masks.

    Raises:
        RequestError: columns that are not understood, a missing processor, an answer cut off whole.
    """
    if is_ready(row):
        return {k: as_tensor(v, k, index) for k, v in row.items() if v is not None and k != COLUMN}
    keys = row.keys()
    if "image" in keys:
        return labelled(pictured(row["image"], processor, index), row, model, index)
    if "audio" in keys:
        return heard(row, model, processor, index)
    need(processor, row, index)
    if "messages" in keys:
        return chat(row["messages"], processor, max_length, index)
    if "prompt" in keys and "completion" in keys:
        return completed(row["prompt"], row["completion"], model, processor, max_length, index)
    if "source" in keys and "target" in keys:
        return translated(row["source"], row["target"], processor, max_length, index)
    if "text" in keys and "label" in keys:
        return labelled(some(tokens_of(processor, row["text"], max_length, index), index), row, model, index)
    if "text" in keys:
        return plain_text(row["text"], model, processor, max_length, index, seed)
    raise RequestError(
        f"row {index} with the columns {', '.join(keys)}",
        expected=f"{COLUMNS}, or the model's own inputs",
        do="rename the columns",
    )
