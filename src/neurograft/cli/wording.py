"""The words of the command line: what an option takes, what it is about, and messages in its terms."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAIRS = ("args", "keep", "changes", "rules", "protected")


def arguments_of(docstring: str) -> dict[str, str]:
    """Read the descriptions of a docstring's Args section.

    Example:
        >>> arguments_of("Do.\\n\\n    Args:\\n        a: first\\n            thing.\\n        b: second.\\n")
        {'a': 'first thing.', 'b': 'second.'}
    """
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(docstring).splitlines():
        if re.fullmatch(r"\w+:", line):
            inside, name = line == "Args:", ""
        elif inside and (head := re.match(r" {4}\*{0,2}(\w+): ?(.*)", line)):
            name = head[1]
            found[name] = head[2]
        elif inside and name and line.strip():
            found[name] += " " + line.strip()
    return found


def metavar(name: str, p: inspect.Parameter) -> str | None:
    """Return what an option's value looks like; None for a flag.

    Example:
        >>> metavar("layers", inspect.Parameter("layers", inspect.Parameter.KEYWORD_ONLY, annotation="Sequence[int]"))
        'A,B,...'
    """
    said = str(p.annotation)
    if isinstance(p.default, bool):
        return None
    if name in PAIRS:
        return "NAME=VALUE"
    if said.startswith(("Choice", "Probes")):
        return "NAME[:KEY=VALUE,...]"
    if said.startswith(("int", "float")):
        return "NUMBER"
    return "A,B,..." if said.startswith(("Sequence", "Iterable", "list", "tuple")) else "TEXT"


def with_choices(text: str) -> str:
    """Return an option's description with the methods of the room it speaks of.

    Example:
        >>> with_choices("the selector, of `neurograft.selectors`.").split(", ")[:2]
        ['the selector: bottom', 'depth']
    """
    found = re.search(r",? of `neurograft\.(\w+)`|: a choice of `(\w+)`|a choice of\s+`(\w+)`", text)
    room = next((r for r in found.groups() if r), "") if found else ""
    if found is None or not (ROOT / room).is_dir():
        return text
    names = sorted(f.stem for f in (ROOT / room).glob("*.py") if not f.stem.startswith("_"))
    before, after = text[: found.start()], text[found.end() :]
    return f"{before.rstrip()}{': ' if found[1] or found[2] else ' one of '}{', '.join(names)}{after}"


def as_typed(text: str, flags: Mapping[str, str]) -> str:
    """Return a message of a verb in the words of the command line: keywords become options.

    Example:
        >>> flags = {"fraction": "--fraction", "overlap": "--overlap", "keep": "--keep", "gain": "--gain"}
        >>> as_typed("give fraction=0.01, or pass overlap='drop'", flags)
        'give --fraction 0.01, or pass --overlap drop'
        >>> as_typed("trim(..., gain=..., keep={...: ...})", flags)
        'give --gain FILE --keep NAME=FILE'
    """

    def option(found: re.Match[str]) -> str:
        given = found[2].strip("'\"")
        if given in ("True", "False"):
            return flags[found[1]] if given == "True" else flags[found[1]].replace("--", "--no-", 1)
        if found[1] in PAIRS:
            given = "NAME=FILE" if found[1] == "keep" else "NAME=VALUE"
        return f"{flags[found[1]]} {'FILE' if given == '...' or found[1] == 'gain' else given}"

    called = re.fullmatch(r"(?:\w+\.)?\w+\(\.\.\., (.*)\)", text)
    names = "|".join(flags)
    made = re.sub(
        rf"\b({names})=(\{{[^}}]*\}}|'[^']*'|\"[^\"]*\"|\([^)]*\)|\[[^]]*\]|[^\s,;)]+)",
        option,
        called[1] if called else text,
    )
    return "give " + made.replace(", --", " --") if called else made
