"""What every command sees to before its verb runs."""

from __future__ import annotations

import os
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
    read = [w for v in words for w in ([v] if isinstance(v, str) else v) if isinstance(w, str) and w]
    place = Path(target).resolve()
    sources = [Path(w).resolve() for w in read if Path(w).exists()]
    if place in sources or (place.exists() and any(source in place.parents for source in sources)):
        raise RequestError(
            f"-o {target}, which is one of the inputs or in one", expected="another path", do="choose a new name"
        )


def writable(target: str | None, *, folder: bool) -> None:
    """Raise, before anything is computed, if a command could not write its result where it is told to.

    Args:
        target: the path behind `-o`; None for nothing to write.
        folder: whether a folder will be written, or a file.

    Raises:
        RequestError: a file in a folder's place or a folder in a file's, a file on the way, no right to write there.
    """
    if target is None:
        return
    if not target:
        raise RequestError("-o and an empty path", expected="a path", do="name one")
    path = Path(target)
    if path.exists() and path.is_dir() != folder:
        raise RequestError(
            f"-o {target}, {'a folder' if path.is_dir() else 'a file'}",
            expected=f"a {'folder' if folder else 'file'}, or a name that is free",
            do="choose another path" if folder else f"name a file in it, as in {path / 'result'}",
        )
    there = next(p for p in path.absolute().parents if p.exists())  # a result is made beside its place, then moved
    if not there.is_dir():
        raise RequestError(f"-o {target}, below the file {there}", expected="a path below a folder", do="name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(
            f"-o {target}, where {there} may not be written", expected="a folder of yours", do="choose another path"
        )


def quiet() -> None:
    """Leave progress bars of libraries to people who watch, and their notes to programmers to programmers."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\b")
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
