"""The command line: every verb under its own name, every keyword of its function as an option of the same name."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and turn errors into exit statuses: 1 the run failed, 2 the request was wrong.

    130 is that of an interrupted program, also while the verb is still being imported.
    """
    try:
        from neurograft.cli.commands import filled

        filled(sys.argv[1:])()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from neurograft.cli.failures import told

        sys.exit(told(error))
