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
from neurograft.cli import arguments as arg
from neurograft.cli import locating, results, unit_page
from neurograft.cli.before import keep_inputs, quiet, writable
from neurograft.cli.options import command_of, value
from neurograft.cli.recipe_help import recipe_help
from neurograft.cli.show import Shown
from neurograft.cli.sketch import definition, sketch
from neurograft.cli.wording import as_typed
from neurograft.core.errors import RequestError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the units of a network that matter, change only those, ship the change as a file, say what it cost.",
)


# verb: (dotted function, its words, default of -o, how the result is shown)
Row = tuple[str, Mapping[str, Any], str | None, Callable[[Any, Path | None, Shown], None]]
VERBS: Mapping[str, Row] = {
    "locate": (
        "neurograft.pipeline.locate", {"model": arg.MODEL, "data": arg.MAYBE_DATA}, "scores.safetensors",
        results.scores,
    ),
    "select": (
        "neurograft.pipeline.select", {"scores": arg.SCORES}, "where.safetensors", results.selection,
    ),
    "evidence": (
        "neurograft.pipeline.evidence", {"model": arg.MODEL, "where": arg.SELECTION, "data": arg.DATA}, None,
        results.evidence,
    ),
    "tune": ("neurograft.pipeline.tune", {"model": arg.MODEL, "data": arg.DATA}, "graft", results.tuned),
    "edit": ("neurograft.pipeline.edit", {"model": arg.MODEL, "requests": arg.REQUESTS}, "graft", results.edit),
    "diff": ("neurograft.pipeline.diff", {"base": arg.BASE, "tuned": arg.TUNED}, "graft", results.graft),
    "audit": ("neurograft.pipeline.audit", {"model": arg.MODEL, "graft": arg.TUNED}, None, results.report),
    "apply": ("neurograft.pipeline.apply", {"base": arg.BASE, "grafts": arg.GRAFTS}, None, results.path),
    "neuron": (
        "neurograft.pipeline.neuron", {"model": arg.MODEL, "unit": arg.UNIT, "data": arg.MAYBE_DATA}, None,
        unit_page.page,
    ),
    "rollback": ("neurograft.pipeline.rollback", {"graft": arg.GRAFT, "edits": arg.EDITS}, "graft", results.edit),
    "trim": ("neurograft.pipeline.trim", {"model": arg.MODEL, "graft": arg.GRAFT}, "trimmed", results.trimmed),
    "plan": ("neurograft.pipeline.plan", {"model": arg.MODEL, "recipe": arg.RECIPE}, None, results.plan),
    "anatomy": ("neurograft.pipeline.anatomy", {"model": arg.MAYBE_MODEL}, None, results.anatomy),
    "papers": ("neurograft.pipeline.papers", {"about": arg.ABOUT}, None, results.papers),
    "cite": ("neurograft.pipeline.cite.cite", {"source": arg.SOURCE}, None, results.citations),
    "demo": ("neurograft.pipeline.demo", {}, None, results.demo),
}  # fmt: skip
ORDER = (
    *("demo", "anatomy", "locate", "select", "evidence", "neuron", "tune", "edit", "run", "plan", "audit", "trim"),
    *("rollback", "diff", "apply", "export", "papers", "cite"),
)  # of the list of commands: as one would use them
LATER = ("merge", "data", "init", "view")
FOLDERS = ("tune", "edit", "diff", "audit", "apply", "rollback", "trim", "demo")  # what these write; the others a file
LIGHT = ("papers", "cite")  # these load no model, nor the libraries that do


def _extra(output: str | None) -> list[inspect.Parameter]:
    def keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    path = Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Where to write.")]
    text = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
    return [keyword("output", path, output), keyword("as_json", text, False)]


def _verb(row: Row) -> Callable[..., None]:
    dotted, words, output, show = row
    function, name = sketch(dotted), dotted.rpartition(".")[2]
    own = set(inspect.signature(function).parameters)

    def body(given: dict[str, Any]) -> None:
        target, shown = given.pop("output"), Shown(given.pop("as_json"))
        if "progress" in own:
            given["progress"] = shown.progress
        keep_inputs(target, given)
        writable(target, folder=name in FOLDERS)
        if "output" in own:
            given["output"] = target
        if name not in LIGHT:
            quiet()
        if "args" in own and sys.stderr.isatty():  # the Trainer draws its own bar
            given["args"] = {"disable_tqdm": False, **(given.get("args") or {})}
        with nullcontext() if own & {"progress", "args"} else shown.busy(name):
            found = function(**given)
        show(found, Path(target) if target else None, shown)

    return command_of(function, body, arguments=words, extra=_extra(output), without=("output",))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"neurograft {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold what every command shares."""


@app.command("run")
def run(
    words: arg.RUN,
    seed: Annotated[int, typer.Option(help="Root of every random number.")] = 0,
    trust: Annotated[
        list[str] | None,
        typer.Option("--trust", metavar="PACKAGE", help="Whose code a recipe file may call; may be repeated."),
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="TEXT", help="Of a Hub id.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="TEXT", help="Load the weights so.")] = None,
    device: Annotated[str | None, typer.Option(metavar="TEXT", help="As device_map of from_pretrained.")] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="PATH", help="Where to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Carry out a recipe: a name, or a YAML or JSON file that may name model, data and options too."""
    from neurograft.pipeline.run_words import run_words

    changes = {w.partition("=")[0]: value(w.partition("=")[2]) for w in words if "=" in w}
    names = [w for w in words if "=" not in w]
    keep_inputs(output, {"words": names})
    writable(output or "graft", folder=True)
    quiet()
    common = {"seed": seed, "trust": trust or (), "revision": revision, "dtype": dtype, "device_map": device}
    try:
        made = run_words(names, changes, **common)
    except RequestError as error:
        raise RequestError(error.came, expected=error.expected, do=as_typed(error.do, {"trust": "--trust"})) from error
    results.outcome(made, Path(output or "graft"), Shown(as_json))


@app.command("export")
def export(
    graft: arg.GRAFT,
    output: Annotated[str, typer.Option("-o", "--output", metavar="PATH", help="Where to write.")],
    to: Annotated[str, typer.Option(metavar="NAME", help="lora, supertuning, merged or patch.")] = "lora",
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="The base, if not where the graft says.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of the format; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Write a graft in another tool's format."""
    from neurograft.cli.options import pairs
    from neurograft.core.grafts.graft import Graft
    from neurograft.pipeline.models import load_model

    keep_inputs(output, {"graft": graft, "model": model})
    writable(output, folder=True)
    quiet()
    found = Graft.load(graft)
    base = load_model(model) if model else None
    try:
        written = found.export(output, to=to, model=base, **pairs("option", options or []))
    except RequestError as error:
        do = as_typed(error.do, {"to": "--to", "partial": "--option partial=true", "model": "--model"})
        raise RequestError(error.came, expected=error.expected, do=do) from error
    results.path(written, None, Shown(as_json))


def _summary(dotted: str) -> str | None:
    """Return the first line of a verb's docstring, or None if this version lacks the verb."""
    found = definition(dotted)
    return None if found is None else (ast.get_docstring(found) or "").split("\n\n")[0]


def filled(words: list[str]) -> typer.Typer:
    """Return the app with the verb that is asked for, and a line for each of the others.

    No verb is imported before it runs: its options are its function's keywords, and everything behind them is heavy.
    """
    running = next(c for c in app.registered_commands if c.name == "run")
    running.epilog = recipe_help(words[1:]) if words[:1] == ["run"] else None
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
    for made in app.registered_commands:
        made.short_help = made.short_help or ((made.callback and made.callback.__doc__) or "").split("\n\n")[0]
    app.registered_commands.sort(key=lambda made: ORDER.index(made.name) if made.name in ORDER else len(ORDER))
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
