"""The commands. Each names its verb, its words and how its result is shown."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from neurograft import __version__
from neurograft.cli import locating, results, unit_page
from neurograft.cli.options import command_of, value
from neurograft.cli.show import Shown
from neurograft.core.errors import RequestError
from neurograft.core.resolve import resolve

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the units of a network that matter, change only those, ship the change as a file, say what it cost.",
)
Model = Annotated[str, typer.Argument(help="A model folder, a Hub id, or a shipped model.")]
Data = Annotated[str, typer.Argument(help="A JSONL, JSON, parquet, npz or safetensors file, or a Hub id.")]
Requests = Annotated[str, typer.Argument(help="A JSONL file: prompt, subject, target_new (+ rephrase, locality).")]
MaybeData = Annotated[str | None, typer.Argument(help="As DATA; not needed by methods that only read weights.")]
File = Annotated[str, typer.Argument(help="A file that an earlier command wrote.")]
Source = Annotated[str, typer.Argument(help="A graft's folder, or a paper's slug.")]
MaybeModel = Annotated[str | None, typer.Argument(help="A model folder, a Hub id, or a shipped model.")]
Words = Annotated[list[str], typer.Argument(help="Several, in order.")]

# verb: (dotted function, its words, default of -o, how the result is shown)
Row = tuple[str, Mapping[str, Any], str | None, Callable[[Any, Path | None, Shown], None]]
VERBS: Mapping[str, Row] = {
    "locate": ("neurograft.pipeline.locate", {"model": Model, "data": MaybeData}, "scores.safetensors", results.scores),
    "select": ("neurograft.pipeline.locate.select", {"scores": File}, "where.safetensors", results.selection),
    "evidence": (
        "neurograft.pipeline.evidence", {"model": Model, "where": File, "data": Data}, None, results.evidence,
    ),
    "tune": ("neurograft.pipeline.tune", {"model": Model, "data": Data}, "graft", results.graft),
    "edit": ("neurograft.pipeline.edit", {"model": Model, "requests": Requests}, "graft", results.edit),
    "diff": ("neurograft.pipeline.diff", {"base": Model, "tuned": Model}, "graft", results.graft),
    "audit": ("neurograft.pipeline.audit", {"model": Model, "graft": Model}, None, results.report),
    "apply": ("neurograft.pipeline.apply", {"base": Model, "grafts": Words}, None, results.path),
    "neuron": ("neurograft.pipeline.neuron", {"model": Model, "unit": File, "data": MaybeData}, None, unit_page.page),
    "rollback": ("neurograft.pipeline.rollback", {"graft": File, "edits": Words}, "graft", results.graft),
    "trim": ("neurograft.pipeline.trim", {"model": Model, "graft": File}, "trimmed", results.graft),
    "plan": ("neurograft.pipeline.plan", {"model": Model, "recipe": File}, None, results.plan),
    "anatomy": ("neurograft.pipeline.anatomy", {"model": MaybeModel}, None, results.anatomy),
    "papers": ("neurograft.pipeline.papers", {}, None, results.papers),
    "cite": ("neurograft.pipeline.papers.cite", {"source": Source}, None, results.data),
    "demo": ("neurograft.pipeline.demo", {}, None, results.demo),
}  # fmt: skip
LATER = ("merge", "data", "init", "view")


def _extra(output: str | None) -> list[inspect.Parameter]:
    def keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    path = Annotated[str | None, typer.Option("-o", "--output", help="Where to write.")]
    text = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
    return [keyword("output", path, output), keyword("as_json", text, False)]


def _verb(row: Row) -> Callable[..., None]:
    dotted, words, output, show = row
    function = resolve(dotted)
    own = set(inspect.signature(function).parameters)

    def body(given: dict[str, Any]) -> None:
        target, shown = given.pop("output"), Shown(given.pop("as_json"))
        if "progress" in own:
            given["progress"] = shown.progress
        keep_inputs(target, given)
        if "output" in own:
            given["output"] = target
        quiet()
        if "args" in own and sys.stderr.isatty():  # the Trainer draws its own bar
            given["args"] = {"disable_tqdm": False, **(given.get("args") or {})}
        with nullcontext() if own & {"progress", "args"} else shown.busy(dotted.rpartition(".")[2]):
            found = function(**given)
        show(found, Path(target) if target else None, shown)

    return command_of(function, body, arguments=words, extra=_extra(output), without=("output",))


def quiet() -> None:
    """Leave progress bars of libraries to people who watch."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


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


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"neurograft {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Hold what every command shares."""


@app.command("run")
def run(
    words: Annotated[list[str], typer.Argument(help="RECIPE [MODEL] [DATA] key=value ...")],
    seed: Annotated[int, typer.Option(help="Root of every random number.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Of a Hub id.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Load the weights so.")] = None,
    device: Annotated[str | None, typer.Option(help="As device_map of from_pretrained.")] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Where to write the graft.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Carry out a recipe: a name, or a YAML or JSON file that may name model, data and options too."""
    from neurograft.pipeline.run import run_words

    changes = {w.partition("=")[0]: value(w.partition("=")[2]) for w in words if "=" in w}
    names = [w for w in words if "=" not in w]
    keep_inputs(output, {"words": names})
    quiet()
    made = run_words(names, changes, seed=seed, revision=revision, dtype=dtype, device_map=device)
    results.outcome(made, Path(output or "graft"), Shown(as_json))


@app.command("export")
def export(
    graft: File,
    output: Annotated[str, typer.Option("-o", "--output", help="Where to write.")],
    to: Annotated[str, typer.Option(help="lora, supertuning, merged or patch.")] = "lora",
    model: Annotated[str | None, typer.Option(help="The base; the one the graft names if left out.")] = None,
    options: Annotated[list[str] | None, typer.Option("--option", help="key=value, may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Write a graft in another tool's format."""
    from neurograft.cli.options import pairs
    from neurograft.core.graft import Graft
    from neurograft.pipeline.models import load_model

    keep_inputs(output, {"graft": graft, "model": model or ""})
    found = Graft.load(graft)
    base = load_model(model) if model else None
    written = found.export(output, to=to, model=base, **pairs("option", options or []))
    results.path(written, None, Shown(as_json))


def _summary(dotted: str) -> str | None:
    """Return the first line of a verb's docstring without importing it, or None if this version lacks the verb."""
    *folders, last = dotted.split(".")[1:]
    root = Path(__file__).parent.parent
    for file in (root.joinpath(*folders, last + ".py"), root.joinpath(*folders).with_suffix(".py")):
        if file.is_file():
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == last]
            return (ast.get_docstring(found[0]) or "").split("\n\n")[0] if found else None
    return None


def filled(words: list[str]) -> typer.Typer:
    """Return the app with the verb that is asked for, and a line for each of the others.

    Only the verb in use is imported: its options are its function's keywords, and everything behind them is heavy.
    """
    for name, row in VERBS.items():
        summary = _summary(row[0])
        if summary is None:
            _placeholder(name, "Not in this version.", hidden=True)
        elif name in words[:1]:
            app.command(name)(locating.command(row[1], _extra(row[2])) if name == "locate" else _verb(row))
        else:
            _placeholder(name, summary, hidden=False)
    for name in LATER:
        _placeholder(name, "Not in this version.", hidden=True)
    return app


def _placeholder(name: str, summary: str, *, hidden: bool) -> None:
    def command(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        raise RequestError(
            f"the verb {name!r}, which is not in this version",
            expected="one of the verbs of `neurograft --help`",
            do="upgrade neurograft once a version with it is out",
        )

    command.__doc__ = summary
    loose = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, hidden=hidden, context_settings=loose)(command)
