"""What is said where a command does not end well, and with which exit status."""

from __future__ import annotations

import os

from rich.console import Console
from rich.markup import escape

from neurograft.core.errors import CALLED_AS, RequestError, RunError

TRACEBACK = "NEUROGRAFT_TRACEBACK"  # set: errors that nobody foresaw come with all of their lines


def told(error: Exception) -> int:
    """Say on standard error what went wrong and return the exit status: 1 the run failed, 2 the request was wrong.

    Args:
        error: what a command raised. A path that cannot be read or written is a wrong request, and so is a callable,
            named by its dotted path, that fails when it is called as a method of its room.

    Raises:
        Exception: the error itself, if it is one that nobody foresaw and the variable of `TRACEBACK` is set.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, RequestError):
        error = RequestError(
            f"{error.filename}, which cannot be read or written ({error.strerror})",
            expected="a path that can",
            do="choose another path, or give yourself the right to it",
        )
    first = (str(error).splitlines() or [""])[0]
    note = next((n for n in getattr(error, "__notes__", ()) if n.startswith(CALLED_AS)), None)
    if note is not None and not os.environ.get(TRACEBACK):
        name, _, how = note.removeprefix(CALLED_AS).partition(": ")
        error = RequestError(
            f"{name}, which failed ({type(error).__name__}: {first})",
            expected=f"a callable {how}",
            do=f"name another one, or mend it: {TRACEBACK}=1 shows where it failed",
        )
    if isinstance(error, RequestError):
        console.print(f"[bold red]got[/]        {escape(error.came)}")
        console.print(f"[bold]expected[/]   {escape(error.expected)}")
        console.print(f"[bold green]to mend it[/] {escape(error.do)}")
        return 2
    if isinstance(error, RunError):
        console.print(f"[bold red]the run failed:[/] {escape(str(error))}")
        return 1
    if os.environ.get(TRACEBACK):
        raise error
    console.print(f"[bold red]the run failed:[/] {type(error).__name__}: {escape(first)}")
    console.print(f"nobody foresaw this: please report it, with what {TRACEBACK}=1 shows")
    return 1
