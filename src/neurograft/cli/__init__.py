"""The command line: every verb under its own name, every keyword of its function as an option of the same name."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and turn errors into exit statuses: 1 the run failed, 2 the request was wrong."""
    from rich.console import Console
    from rich.markup import escape

    from neurograft.cli.commands import filled
    from neurograft.core.errors import RequestError, RunError

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        filled(sys.argv[1:])()
    except RequestError as error:
        errors.print(f"[bold red]got[/]        {escape(error.came)}")
        errors.print(f"[bold]expected[/]   {escape(error.expected)}")
        errors.print(f"[bold green]to mend it[/] {escape(error.do)}")
        sys.exit(2)
    except RunError as error:
        errors.print(f"[bold red]the run failed:[/] {escape(str(error))}")
        sys.exit(1)
