"""Changes and models by path, where they may also be given live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neurograft.core.grafts.graft import Graft
from neurograft.pipeline.models import load_model


def loaded(given: Any) -> Any:
    """Return grafts and models for the paths among what was given; anything else as it is.

    Args:
        given: a graft's or a model's folder, a Hub id of a model, several of them, or live ones.

    Raises:
        RequestError: nothing is there, or it cannot be read.
    """
    if isinstance(given, (list, tuple)):
        return [loaded(one) for one in given]
    if isinstance(given, (str, Path)):
        return Graft.load(given) if (Path(given) / "graft.json").is_file() else load_model(given)
    return given
