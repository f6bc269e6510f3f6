"""The command line, run in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import neurograft as ng
from neurograft.cli import main


def command(*words: object) -> tuple[int, str, str]:
    """Run a command; return its status, what it printed and what it complained of."""
    status, out, errors = 0, StringIO(), StringIO()
    with patch.object(sys, "argv", ["neurograft", *map(str, words)]), redirect_stdout(out), redirect_stderr(errors):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), errors.getvalue()


def graft_of_command(name: str, model: object, data: object, changes: Mapping[str, Any], target: Path) -> ng.Graft:
    """Run a recipe, and return the graft it writes to a folder."""
    said = [f"{k}={json.dumps(v) if isinstance(v, (list, tuple)) else v}" for k, v in changes.items()]
    status, _, errors = command("run", name, model, data, *said, "-o", target)
    assert status == 0, errors
    return ng.Graft.load(target)
