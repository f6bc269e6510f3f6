"""`make docs`: write the pages that follow from the code: methods by room, and the papers that have a recipe."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neurograft.core.card import Card
from neurograft.core.choose import ROOMS, methods, option_names
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve
from neurograft.pipeline import _proofs
from neurograft.pipeline.cite import cite
from neurograft.pipeline.papers import card, known
from neurograft.pipeline.recipe import Recipe, recipe, recipes

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py from the code; change the code and run `make docs`. -->\n"
QUESTIONS: Mapping[str, str] = {
    "locators": "Which units matter?",
    "selectors": "Which of them do we take?",
    "adapters": "What becomes trainable, in what shape?",
    "objectives": "What is asked of the model?",
    "schedules": "What is awake when?",
    "optimizers": "How does the change move?",
    "data": "From which examples, in what order?",
    "edits": "Which change follows without training?",
    "mergers": "How do several changes become one?",
    "routers": "Which graft answers this input?",
    "audits": "What was gained and lost, and where?",
    "networks": "Reference networks.",
    "worlds": "Data and tiny models whose truth is known.",
    "export": "Which other format does a graft take?",
}


# benchmark -> (where its rows are, title of its page)
BOARDS: Mapping[str, tuple[str, str]] = {
    "editing": ("methods", "A thousand edits, one after another"),
    "planted": ("worlds", "Which locator finds what is there?"),
    "selective": ("contenders", "What selective tuning costs and buys"),
    "selective_images": ("contenders", "What selective tuning costs and buys on images"),
}


def pages() -> dict[str, str]:
    """Return every generated page: path under `docs` -> text."""
    found = {f"methods/{room}.md": room_page(room) for room in ROOMS if public(room)}
    rows = [name for name in recipes() if card(name).paper]
    found |= {f"papers/{name.replace('_', '-')}.md": paper_page(name) for name in rows}
    found["methods/README.md"] = index("Methods by room", {r: QUESTIONS[r] for r in ROOMS if public(r)})
    found["papers/README.md"] = papers_page(rows)
    found |= {f"{name}.md": board_page(name, key, title) for name, (key, title) in BOARDS.items()}
    return found


def index(title: str, entries: Mapping[str, str]) -> str:
    """Return a page that lists others."""
    return f"{NOTE}# {title}\n\n" + "".join(f"- [{name}]({name}.md): {text}\n" for name, text in entries.items())


def board_page(name: str, key: str, title: str) -> str:
    """Return the page of a benchmark's checked-in results, as the benchmark itself shows them."""
    folder = HERE.parent / "benchmarks"
    with patched_path(folder):
        module = importlib.import_module(name)
    data = json.loads((folder / "results" / f"{name}.json").read_text(encoding="utf-8"))
    prose = "\n\n".join(p for p in (module.__doc__ or "").strip().split("\n\n")[1:] if not p.startswith("    "))
    made = data["machine"]
    where = (
        f"`benchmarks/{name}.py`, commit {data['commit'][:7]}, {data['date']}, {made['cpu']}, {data['threads']} thread."
    )
    picture = f"![{title}](images/{name}.svg)\n\n" if (HERE / "images" / f"{name}.svg").is_file() else ""
    return f"{NOTE}# {title}\n\n{prose}\n\n{where}\n\n{picture}{module.lines(data[key]).strip()}\n"


@contextmanager
def patched_path(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported for the length of a block."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def papers_page(rows: Sequence[str]) -> str:
    """Return the page that lists the papers with a recipe: what each does, and how far its proof goes."""
    text = (
        f"{NOTE}# Papers with a recipe\n\nScale `identity`: exact properties of the mechanism, the paper's effect was "
    )
    text += "not asked for or did not show at this size; `tiny`: the effect shows on a tiny model too.\n\n"
    text += "| recipe | what it does | scale | bars met |\n|---|---|---|---|\n"
    for name in rows:
        slug, record = name.replace("_", "-"), _proofs.read().get(name.replace("_", "-"), {})
        does, _ = sections(inspect.getdoc(resolve(f"neurograft.recipes.{name}")) or "")
        bars = list(record.get("bars", {}).values())
        met = f"{sum(b['met'] for b in bars)} of {len(bars)}" if bars else ""
        text += f"| [{slug}]({slug}.md) | {cell(does.splitlines()[0])} | {record.get('scale', 'none')} | {met} |\n"
    return text


def public(room: str) -> dict[str, Callable[..., Any]]:
    """Return a room's methods; files without a function of their name, and those whose extra is missing, left out."""
    found = {}
    for name in methods(room):
        try:
            method = resolve(f"neurograft.{room}.{name}")
        except (ImportError, RequestError):
            continue
        if inspect.isfunction(method) or (inspect.isclass(method) and hasattr(method, "card")):
            found[name] = method
    return found


def room_page(room: str) -> str:
    """Return the page of a room: what each method says of itself."""
    text = f"{NOTE}# {room}\n\n{QUESTIONS[room]}\n"
    for name, method in public(room).items():
        mine: Card = getattr(method, "card", Card())
        text += f"\n## {name}\n\n{described(method)}"
        facts = {
            "paper": mine.paper and f"{mine.paper} (arXiv {known()[mine.paper]['arxiv']})",
            "units": ", ".join(sorted(mine.kinds)),
            "needs": ", ".join(sorted(mine.needs)),
            "departs": mine.departs,
        }
        text += "".join(f"- {key}: {value}\n" for key, value in facts.items() if value)
    return text


def described(method: Callable[..., Any]) -> str:
    """Return a function's text, its options with their defaults, and nothing of its examples."""
    words, arguments = sections(inspect.getdoc(method) or "")
    options = option_names(method)
    text = words + "\n\n"
    if options:
        text += "| option | default | |\n|---|---|---|\n"
        for name, option in options.items():
            value = option.default
            named = value.__name__ if inspect.isfunction(value) else repr(value)
            default = "required" if value is option.empty else f"`{named}`"
            text += f"| `{name}` | {default} | {cell(arguments.get(name, ''))} |\n"
        text += "\n"
    return text


def sections(doc: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into its prose and its arguments.

    Example:
        >>> sections("Do it.\\n\\nArgs:\\n    a: first,\\n        and more.\\n    b: second.\\n\\nReturns:\\n    c.")
        ('Do it.', {'a': 'first, and more.', 'b': 'second.'})
    """
    prose, arguments, current, inside = [], {}, "", ""
    for line in doc.splitlines():
        if line in ("Args:", "Returns:", "Raises:", "Example:"):
            inside = line
        elif inside == "Args:" and line.startswith("    ") and not line.startswith("     "):
            current, _, rest = line.strip().partition(": ")
            arguments[current] = rest
        elif inside == "Args:" and line.strip() and current:
            arguments[current] += " " + line.strip()
        elif not inside:
            prose.append(line)
    return "\n".join(prose).strip(), arguments


def cell(text: str) -> str:
    """Return a text that does not break a table."""
    return text.replace("|", "\\|")


def paper_page(name: str) -> str:
    """Return the page of a paper: what its recipe does, how to run it, where it departs, what was shown."""
    slug, function, mine = name.replace("_", "-"), resolve(f"neurograft.recipes.{name}"), card(name)
    made = recipe(name)
    text = f"{NOTE}# {known()[slug]['title']}\n\n{cite(slug)[0]}\n\n{described(function)}"
    text += f'```python\nout = ng.run("{name}", model, data)\nout.graft.save("{slug}-graft")\n```\n\n'
    text += f"```sh\nneurograft run {name} MODEL DATA -o {slug}-graft\n```\n\n## Steps\n\n```yaml\n{steps(made)}```\n"
    if mine.departs:
        text += f"\n## Where it departs from the paper\n\n{mine.departs}\n"
    return text + proof(slug)


def steps(made: Recipe) -> str:
    """Return a recipe's steps, one a line."""
    return "".join(f"- {json.dumps(dict(step))}\n" for step in made.steps)


def proof(slug: str) -> str:
    """Return what the record says of a proof."""
    record = _proofs.read().get(slug)
    if record is None:
        return "\n## Proof\n\nNone is recorded.\n"
    result = "passes" if record["passed"] else "fails"
    text = f"\n## Proof\n\n`tests/proofs/test_{slug.replace('-', '_')}.py` {result}; its scale is {record['scale']}.\n"
    if record["broken"]:
        text += "\nIt fails, as it must, under each of these sabotages:\n\n"
        text += "".join(f"- {words(name)}: noticed by `{test}`\n" for name, test in record["broken"].items() if test)
    text += bars(record.get("bars", {}))
    if record["numbers"]:
        text += "\nMeasured, a number for each seed:\n\n| | |\n|---|---|\n"
        text += "".join(f"| {words(key)} | {figures(value)} |\n" for key, value in record["numbers"].items())
    return text


def bars(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the paper's card asks beside what was reached."""
    if not found:
        return ""
    text = (
        "\nWhat is asked of the mean over seeds, and what was reached:\n\n| | asked | reached | |\n|---|---|---|---|\n"
    )
    for what, b in found.items():
        text += f"| {what} | {b['asked']} | {figures(b['reached'])} | {'met' if b['met'] else '**not met**'} |\n"
    return text


def words(name: str) -> str:
    """Return a name in words."""
    return name.replace("_", " ")


def figures(value: Any) -> str:
    """Return numbers with three digits."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"{v:.3g}" if isinstance(v, (int, float)) else str(v) for v in values)


def main() -> int:
    """Write the pages, and remove those whose subject is gone."""
    found = pages()
    for path, text in found.items():
        target = HERE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for folder in ("methods", "papers"):
        for old in (HERE / folder).glob("*.md"):
            if f"{folder}/{old.name}" not in found:
                old.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
