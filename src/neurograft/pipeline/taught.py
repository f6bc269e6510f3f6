"""A step of recipes: what describes the units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.locators._describers import describer_for
from neurograft.pipeline.inputs import as_batches, processor_for
from neurograft.pipeline.rows import read_rows


def taught(state: Mapping[str, Any], *, describer: Any = None, pairs: Any = None) -> dict[str, Any]:
    """Return as `describer` what describes the units of the run's model on its data.

    Args:
        state: what the recipe has made so far, its model and data.
        describer: a describer, the folder of a saved one, or "tokens", "words", "captions"; None for tokens of texts
            and words of images.
        pairs: rows of `images` [k, C, H, W], `masks` [k, H, W] and `description` to teach words or captions on;
            synthetic scenes if None.

    Raises:
        RequestError: an unknown describer, or one that does not go with the data.
    """
    options: Mapping[str, Any] = state.get("common", {})
    processor = processor_for(state["model"], options.get("processing_class"))
    batches = as_batches(state["data"], state["model"], processing_class=processor)
    rows = None if pairs is None else read_rows(pairs)
    seed = options.get("seed", 0)
    return {"describer": describer_for(batches, describer, pairs=rows, processor=processor, seed=seed)}
