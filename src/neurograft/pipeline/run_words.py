"""`run` as the command line calls it: RECIPE [MODEL] [DATA] in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neurograft.core.errors import RequestError
from neurograft.pipeline.run import Outcome, run


def run_words(words: Sequence[str], changes: Mapping[str, Any], **common: Any) -> Outcome:
    """Carry out what the command line names: RECIPE [MODEL] [DATA], the recipe by name or as a file.

    Raises:
        RequestError: no word or too many.
    """
    if not 1 <= len(words) <= 3:
        raise RequestError(
            f"the words {' '.join(words)!r}", expected="RECIPE [MODEL] [DATA] key=value ...", do="check them"
        )
    return run(*words, changes=changes, **common)
