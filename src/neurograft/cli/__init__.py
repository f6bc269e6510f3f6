"""The command line: every verb under its own name, every keyword of its function as an option of the same name."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and turn errors into exit statuses: 1 the run failed, 2 the request was wrong."""
    from neurograft.cli.commands import filled
    from neurograft.cli.failures import told

    try:
        filled(sys.argv[1:])()
    except Exception as error:
        sys.exit(told(error))
