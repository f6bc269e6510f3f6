"""What every command sees to before its verb runs."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurograft.core.errors import RequestError


def keep_inputs(target: str | None, given: Mapping[str, Any]) -> None:
    """Raise if a command would write over something it reads."""
    if target is None:
        return
    words = [v for v in given.values() if isinstance(v, (str, list, tuple))]
    read = [w for v in words for w in ([v] if isinstance(v, str) else v) if isinstance(w, str)]
    place = Path(target).resolve()
    sources = [Path(w).resolve() for w in read if Path(w).exists()]
    if place in sources or (place.exists() and any(source in place.parents for source in sources)):
        raise RequestError(
            f"-o {target}, which is one of the inputs or in one", expected="another path", do="choose a new name"
        )


def quiet() -> None:
    """Leave progress bars of libraries to people who watch, and their notes to programmers to programmers."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\b")
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
