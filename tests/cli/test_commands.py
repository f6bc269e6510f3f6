"""The command line: exit statuses, messages, files; the verbs themselves are tested where they live."""

import inspect
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from neurograft.anatomy.sites import sites
from neurograft.cli import main
from neurograft.cli.commands import LATER, VERBS
from neurograft.cli.locating import divided
from neurograft.core.resolve import resolve
from neurograft.core.selection import Scores, Selection
from neurograft.pipeline.attach import attach
from neurograft.pipeline.cite import cite
from neurograft.worlds.letters import letters
from neurograft.worlds.pico import pico


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    pico("llama").save_pretrained(path / "model")
    letters().save_pretrained(path / "model")
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(4)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def run(monkeypatch, capsys, *words):
    """Run a command in this process; return its status, what it printed and what it complained."""
    monkeypatch.setattr(sys, "argv", ["neurograft", *map(str, words)])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_locate_and_select_write_what_python_would(folder, monkeypatch, capsys):
    scores, where = folder / "s.safetensors", folder / "w.safetensors"
    words = ("--by", "magnitude", "--units", "neuron", "--json", "-o", scores)
    status, out, _ = run(monkeypatch, capsys, "locate", folder / "model", *words)
    assert status == 0
    found = json.loads(out)
    assert found["units"] == 2 * 48
    status, out, _ = run(monkeypatch, capsys, "select", scores, "--count", 3, "--per", "layer", "--json", "-o", where)
    assert status == 0
    assert json.loads(out)["chosen"] == 6
    assert Selection.load(where).digest == Scores.load(scores).top(count=3, per="layer").digest


def test_choices_take_options(folder, monkeypatch, capsys):
    words = ("--by", "grad_x_act", "--layers", "0", "--limit", "4", "--json", "-o", folder / "g.safetensors")
    status, out, err = run(monkeypatch, capsys, "locate", folder / "model", folder / "data.jsonl", *words)
    assert status == 0, err
    assert json.loads(out)["units"] == 48


def test_locate_comes_with_evidence_on_examples_it_kept_back(folder, monkeypatch, capsys):
    many = folder / "many.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10, 15) for b in range(4)]
    many.write_text("\n".join(map(json.dumps, [*rows, *rows])))  # copies must not fall on both sides
    words = ("locate", folder / "model", many, "--controls", "3", "--fraction", "0.1", "-o", folder / "e.safetensors")
    status, out, err = run(monkeypatch, capsys, *words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert len(found["evidence"]["families"]["random"]["effects"]) == 3
    assert found["evidence"]["provenance"]["disjoint"] is True
    assert found["evidence"]["provenance"]["dropped"] == 0
    assert len(found["card"]["examples"]) == 30
    assert run(monkeypatch, capsys, *words)[1].startswith("evidence: ")
    assert run(monkeypatch, capsys, *words, "--no-evidence")[1].startswith("no evidence: not wanted")


BYTES = (".jsonl", ".parquet", ".npz", ".safetensors")


def test_every_verb_has_the_words_its_command_passes():
    for dotted, words, *_ in VERBS.values():
        assert set(words) <= set(inspect.signature(resolve(dotted)).parameters), dotted


def test_cite_takes_a_slug_and_a_graft(spoiled, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "cite", "smt")[1].startswith("Sparse Matrix in Large Language Model")
    status, out, _ = run(monkeypatch, capsys, "cite", spoiled / "graft", "--json")
    assert (status, json.loads(out)) == (0, [])


def test_audit_takes_a_tuned_model_and_names_with_commas(spoiled, monkeypatch, capsys):
    """Positional words are names: `2024` is no number and `a,b` no list."""
    monkeypatch.chdir(spoiled)
    for name in ("2024", "a,b"):
        shutil.copytree("other", name)
        words = ("audit", "model", name, "--gain", "data.jsonl", "--probes", "none", "--limit", "8", "--json")
        status, out, err = run(monkeypatch, capsys, *words)
        assert status in (0, 3), err
        assert json.loads(out)["provenance"]["change"]["kind"] != "graft"
        assert run(monkeypatch, capsys, "anatomy", name)[0] == 0


WRONG = {
    "unknown model": (("locate", "nowhere/at/all", "--by", "noise"), "no folder is"),
    "unknown kind": (("locate", "MODEL", "--by", "noise", "--units", "neurn"), "'neuron'"),
    "unknown site": (("locate", "MODEL", "--by", "noise", "--match", "*.mpl/neuron"), "mlp/neuron"),
    "unknown method": (("locate", "MODEL", "--by", "gradxact"), "grad_x_act"),
    "unknown option of a method": (("locate", "MODEL", "--by", "noise:sed=1"), "sed"),
    "missing data": (("locate", "MODEL"), "give data"),
    "empty data": (("locate", "MODEL", "EMPTY"), "no rows"),
    "not a number": (("locate", "MODEL", "NAN"), "not finite"),
    "no labels": (("tune", "MODEL", "BARE", "-o", "OUT"), "label"),
    "a selection of nothing": (("tune", "MODEL", "DATA", "--where", "NOTHING", "-o", "OUT"), "touches no parameter"),
    "a selection of another model": (("tune", "MODEL", "DATA", "--where", "FOREIGN", "-o", "OUT"), "this model"),
    "tied weights": (("tune", "TIED", "DATA", "--where", "TOKENS", "-o", "OUT"), "tied"),
    "unknown training argument": (("tune", "MODEL", "DATA", "--args", "learning_rat=1", "-o", "OUT"), "learning_rate"),
    "unknown recipe": (("run", "s2tf", "MODEL", "DATA"), "s2ft"),
    "a recipe option that is no number": (("run", "s2ft", "MODEL", "DATA", "fraction=much"), "a number"),
    "a fraction that is no number": (("select", "SCORES", "--fraction", "nan"), "more than 0"),
    "a recipe without a model": (("run", "s2ft"), "a model"),
    "unknown key of a recipe": (("run", "s2ft", "MODEL", "DATA", "fractoin=0.1"), "fraction"),
    "writing over its input": (("select", "SCORES", "-o", "SCORES"), "one of the inputs"),
    "writing over a file of its input": (("locate", "MODEL", "--by", "noise", "-o", "CONFIG"), "one of the inputs"),
    "no controls": (("evidence", "MODEL", "SOME", "DATA", "--controls", "0"), "at least one"),
    "a graft that is none": (("export", "MODEL", "-o", "OUT"), "graft"),
    "a graft for another base": (("apply", "OTHER", "GRAFT", "-o", "OUT"), "base"),
    "a truncated graft": (("apply", "MODEL", "SHORT", "-o", "OUT"), "truncated or changed"),
    "a second apply": (("apply", "MODEL", "GRAFT", "GRAFT", "-o", "OUT"), "second apply"),
    "unknown anatomy": (("anatomy", "STRANGE"), "anatomy"),
    "a line that is no text": (("locate", "MODEL", "BYTES.jsonl"), "line 1"),
    "no parquet": (("locate", "MODEL", "BYTES.parquet"), "parquet"),
    "no archive of arrays": (("locate", "MODEL", "BYTES.npz"), "arrays"),
    "no safetensors": (("locate", "MODEL", "BYTES.safetensors"), "safetensors"),
    "a model whose config is no JSON": (("anatomy", "GARBLED"), "config.json"),
    "a model whose weights are cut short": (("locate", "CUT", "--by", "magnitude"), "weights cannot be read"),
    "a device that is not here": (("locate", "MODEL", "--by", "magnitude", "--device", "nodevice:7"), "device_map"),
    "a training argument that is no number": (
        ("tune", "MODEL", "DATA", "--args", "learning_rate=fast", "-o", "OUT"),
        "a number",
    ),
    "a training argument of no meaning": (
        ("tune", "MODEL", "DATA", "--args", "eval_strategy=never", "-o", "OUT"),
        "training arguments",
    ),
    **{
        f"{option} {name}": ((*words, option, name), expected)
        for words, option in (
            (("locate", "MODEL", "DATA"), "--by"),
            (("locate", "MODEL", "DATA"), "--objective"),
            (("select", "SCORES"), "--by"),
            (("evidence", "MODEL", "SOME", "DATA"), "--objective"),
            (("tune", "MODEL", "DATA", "-o", "OUT"), "--adapter"),
            (("tune", "MODEL", "DATA", "-o", "OUT"), "--objective"),
            (("tune", "MODEL", "DATA", "-o", "OUT"), "--schedule"),
            (("tune", "MODEL", "DATA", "-o", "OUT"), "--optimizer"),
            (("audit", "MODEL", "GRAFT", "--gain", "DATA"), "--metrics"),
        )
        for name, expected in (("not.there", "cannot be imported"), ("os.sep", "a str"), ("json.dumps", "a callable ("))
        if (option, name) != ("--optimizer", "json.dumps")
    },
    "a name that is called and fails": (("locate", "MODEL", "DATA", "--by", "os.system"), "os.system, which failed"),
    "a name that returns something else": (("select", "SCORES", "--by", "builtins.repr"), "returned a str"),
    "a method of another room": (("locate", "MODEL", "DATA", "--by", "neurograft.selectors.top"), "of selectors"),
    "a name that begins with dots": (("locate", "MODEL", "DATA", "--by", ".."), "a dotted name"),
    "parameters that cannot be read": (("select", "SCORES", "--by", "collections.OrderedDict"), "cannot be read"),
    "a metric without dots": (("audit", "MODEL", "GRAFT", "--gain", "DATA", "--metrics", "nothing"), "its dotted name"),
    "a metric that is there": (("audit", "MODEL", "GRAFT", "--gain", "DATA", "--metrics", "exact"), "without being"),
    "no recipe's name": (("run", "os.getcwd", "MODEL", "DATA"), "returned a str"),
    "an empty option": (("locate", "MODEL", "DATA", "--layers", ""), "nothing for it"),
    "layers that are none": (("locate", "MODEL", "DATA", "--layers", "0.5"), "-2 to 1"),
    "a block of one side": (("locate", "MODEL", "DATA", "--units", "block", "--block", "2"), "two whole numbers"),
    "a block of words": (("locate", "MODEL", "DATA", "--units", "block", "--block", "x,y"), "two whole numbers"),
    "held-out data nobody wants": (("locate", "MODEL", "DATA", "--no-evidence", "--held-out", "DATA"), "one of them"),
    "a model to compare with nothing": (
        ("locate", "MODEL", "--by", "magnitude", "--against", "OTHER"),
        "leave against",
    ),
    "a model to compare that is none": (("locate", "MODEL", "--by", "change", "--against", "nowhere/at/all"), "folder"),
    "a level above 1": (("evidence", "MODEL", "SOME", "DATA", "--level", "2"), "below 1"),
    "protected without names": (("evidence", "MODEL", "SOME", "DATA", "--protected", "x"), "key=value"),
    "no draws": (("audit", "MODEL", "GRAFT", "--gain", "DATA", "--rules", "draws=0"), "a value like 2000"),
    "fewer than no pages": (("audit", "MODEL", "GRAFT", "--gain", "DATA", "--neurons", "-1"), "at least 0"),
    "a shard of no size": (("apply", "MODEL", "GRAFT", "--shard", "-1", "-o", "OUT"), "200MB"),
    "an unknown describer of no data": (
        ("neuron", "MODEL", "model.layers.0.mlp/neuron:0", "--describer", "x"),
        "examples to describe",
    ),
    "a page of nothing": (("neuron", "MODEL", "model.layers.0.mlp/neuron:0", "DATA", "--top", "0"), "at least 1"),
    "half a step": (("tune", "MODEL", "DATA", "--args", "max_steps=1.5", "-o", "OUT"), "a whole number"),
    "a seed below 0": (("tune", "MODEL", "DATA", "--seed", "-1", "-o", "OUT"), "2**32"),
    "a tracker of nobody": (("tune", "MODEL", "DATA", "--args", "report_to=nobody", "-o", "OUT"), "not supported"),
    "an optimizer's wrong number": (
        ("tune", "MODEL", "DATA", "--optimizer", "sgd:lr=-1", "-o", "OUT"),
        "torch.optim.SGD",
    ),
    "the best of no evaluation": (
        ("tune", "MODEL", "DATA", "--args", "load_best_model_at_end=true", "-o", "OUT"),
        "eval",
    ),
    "an evaluation that never comes": (("tune", "MODEL", "DATA", "--eval-dataset", "DATA", "-o", "OUT"), "when to"),
    "a turn to others that never comes": (
        ("tune", "MODEL", "DATA", "--reselect", "{locate: {by: magnitude}}", "-o", "OUT"),
        "that selects anew",
    ),
    "rows for no slice": (("tune", "MODEL", "DATA", "--new", "lm_head.weight=3", "-o", "OUT"), "adapter slice"),
    "more rows than there are": (
        ("tune", "MODEL", "DATA", "--where", "SOME", "--new", "lm_head.weight=99", "-o", "OUT"),
        "1 to 63",
    ),
    "a selection of a wider model": (("tune", "WIDE", "DATA", "--where", "SOME", "-o", "OUT"), "of another shape"),
    "a selection of narrower neurons": (("evidence", "WIDE", "SOME", "DATA"), "of another shape"),
    "edits in a wider model's units": (
        ("edit", "WIDE", "REQUESTS", "--where", "SOME", "-o", "OUT"),
        "of another shape",
    ),
    "an audit of a wider model": (("audit", "MODEL", "WIDE", "--gain", "DATA"), "has shape (64, 64)"),
    "an audit of a longer model": (("audit", "MODEL", "DEEP", "--gain", "DATA"), "3 blocks in 'model.layers'"),
    "an audit of a shorter model": (("audit", "DEEP", "MODEL", "--gain", "DATA"), "2 blocks in 'model.layers'"),
    "an audit of another architecture": (("audit", "MODEL", "TIED", "--gain", "DATA"), "that has 1 of the"),
    "a change of depth": (("diff", "MODEL", "DEEP", "-o", "OUT"), "3 blocks in 'model.layers'"),
    "a change of width": (("diff", "MODEL", "WIDE", "-o", "OUT"), "equal shapes"),
    "a change of architecture": (("diff", "MODEL", "TIED", "-o", "OUT"), "share no tensor"),
    "a graft for a wider base": (("apply", "WIDE", "GRAFT", "-o", "OUT"), "has shape"),
    "an earlier edit of another base": (("edit", "OTHER", "REQUESTS", "--after", "GRAFT", "-o", "OUT"), "base"),
    "trust in a recipe by name": (("run", "s2ft", "MODEL", "DATA", "--trust", "os", "-o", "OUT"), "no recipe file"),
    "a citation of nothing": (("cite", "s2tf"), "s2ft"),
    "a verb of later": (("merge", "MODEL", "a", "b"), "not in this version"),
}
NAMES = {
    "MODEL": "model", "DATA": "data.jsonl", "SCORES": "n.safetensors", "OUT": "out", "EMPTY": "empty.jsonl",
    "NAN": "nan.npz", "BARE": "bare.npz", "NOTHING": "nothing.safetensors", "FOREIGN": "foreign.safetensors",
    "TIED": "gpt2", "TOKENS": "tokens.safetensors", "OTHER": "other", "GRAFT": "graft", "SHORT": "short",
    "CONFIG": "model/config.json", "SOME": "some.safetensors", "WIDE": "wide", "DEEP": "deep",
    "REQUESTS": "requests.jsonl",
    "STRANGE": "strange", "GARBLED": "garbled", "CUT": "cut", **{f"BYTES{e}": f"bytes{e}" for e in BYTES},
}  # fmt: skip


@pytest.fixture(scope="module")
def spoiled(folder):
    """Fill the folder with everything that can be wrong."""
    (folder / "empty.jsonl").write_text("")
    tokens = np.full((2, 4), 5)
    np.savez(folder / "nan.npz", input_ids=tokens, labels=tokens, weight=np.full((2, 1), np.nan))
    np.savez(folder / "bare.npz", input_ids=tokens)
    model, tied = pico("llama"), pico("gpt2")
    found = sites(model, "neuron")
    Selection.of(found, {}).save(folder / "nothing.safetensors")
    neurons = Selection.of(found, {name: [0] for name in found})
    neurons.save(folder / "some.safetensors")
    other = sites(tied, "neuron")
    Selection.of(other, {name: [0] for name in other}).save(folder / "foreign.safetensors")
    words = sites(tied, "token")
    Selection.of(words, {name: [3] for name in words}).save(folder / "tokens.safetensors")
    tied.save_pretrained(folder / "gpt2")
    letters().save_pretrained(folder / "gpt2")
    pico("llama", seed=1).save_pretrained(folder / "other")
    letters().save_pretrained(folder / "other")
    for name, config in {"wide": {"hidden_size": 64}, "deep": {"num_hidden_layers": 3}}.items():
        pico("llama", **config).save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    (folder / "requests.jsonl").write_text('{"prompt": "1+1=", "target_new": "3"}')
    with attach(model, neurons) as live:
        for p in live.parameters():
            p.data.add_(0.5)
        live.write()
        live.graft().save(folder / "graft")
    shutil.copytree(folder / "graft", folder / "short")
    file = folder / "short" / "graft.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (folder / "strange").mkdir()
    (folder / "strange" / "config.json").write_text('{"model_type": "nobody-knows"}')
    for suffix in BYTES:
        (folder / f"bytes{suffix}").write_bytes(b"\x80\x04\x95" * 9)
    for name in ("garbled", "cut"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "garbled" / "config.json").write_text("{")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_exit_2_and_say_what_to_do(case, spoiled, monkeypatch, capsys):
    folder = spoiled
    words, expected = WRONG[case]
    monkeypatch.chdir(folder)
    run(monkeypatch, capsys, "locate", folder / "model", "--by", "noise", "-o", folder / "n.safetensors")
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    status, out, err = run(monkeypatch, capsys, *[folder / NAMES[w] if w in NAMES else w for w in words])
    assert status == 2, (out, err)
    assert all(word in err for word in ("got", "expected", "to mend it")), err
    assert expected in err
    assert len(err.splitlines()) < 20
    assert "Traceback" not in err
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def test_no_input_is_on_both_sides_whatever_its_answers_are():
    rows = [{"source": f"s{i % 40}", "target": f"t{i}"} for i in range(120)]
    kept, held, _ = divided(rows, evidence=True, held_out=None, seed=0)
    assert len(held) >= 8
    assert len(kept) + len(held) == len(rows)
    assert not {row["source"] for row in kept} & {row["source"] for row in held}
    _, held, reason = divided(rows[:40] * 2, evidence=True, held_out=None, seed=0, answers={"source", "target"})
    assert (held, reason.split(" are")[0]) == (None, "1 different examples")


def test_unknown_options_of_a_command_exit_2(folder, monkeypatch, capsys):
    status, _, _ = run(monkeypatch, capsys, "locate", folder / "model", "--buy", "noise")
    assert status == 2


@pytest.mark.parametrize("verb", [*VERBS, *LATER])
def test_every_verb_has_a_summary_or_is_said_to_be_missing(verb, monkeypatch, capsys):
    from neurograft.cli.commands import _summary

    if verb in VERBS:
        assert _summary(VERBS[verb][0]), f"{verb} has no function"
        status, out, _ = run(monkeypatch, capsys, verb, "--help")
        assert status == 0
        assert "--help" in out
    else:
        assert run(monkeypatch, capsys, verb)[0] == 2


def test_the_help_of_run_tells_a_recipes_options(folder, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "run", "nmke", "--help")
    assert status == 0
    flat = " ".join(out.split())
    assert "Options of nmke, as key=value: mask=post: " in flat
    assert "layers=null: whose FFNs" in flat
    assert "lr=0.5: its learning rate" in flat
    status, out, _ = run(monkeypatch, capsys, "run", "--help")
    assert "locft_bf, loki" in " ".join(out.split())
    assert "Options of" not in out
    status, out, err = run(monkeypatch, capsys, "run", "nmkee", "--help")
    assert (status, "did you mean 'nmke'" in err) == (2, True)
    assert run(monkeypatch, capsys, "run", "recipe.yaml", "--help")[0] == 0


def test_a_plan_of_a_recipe_that_tunes_nothing_says_so(folder, monkeypatch, capsys):
    for recipe, verb in (("nmke", "edit"), ("sparse_reward", "intervene")):
        status, out, err = run(monkeypatch, capsys, "plan", folder / "model", recipe)
        assert status == 0, err
        assert "0 trainable numbers" in out
        assert f"written by {verb}, without a Trainer" in out


@pytest.mark.parametrize("verb", VERBS)
def test_the_words_of_a_command_are_words_of_its_function(verb):
    dotted, words, *_ = VERBS[verb]
    assert words.keys() <= inspect.signature(resolve(dotted)).parameters.keys()


def test_cite_names_papers_of_a_slug_or_a_graft_s_folder_or_says_there_are_none(folder, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "cite", "s2ft")
    assert (status, "arXiv:2412.06289" in out) == (0, True)
    model = pico("llama")
    where = Selection.of(sites(model, "neuron"), {"model.layers.0.mlp/neuron": [0]})
    with attach(model, where) as live:
        grafts = {"by": live.graft()}
    grafts["without"] = replace(grafts["by"], card={})
    grafts["by"] = replace(grafts["by"], card={"objective": {"path": "neurograft.objectives.dft", "options": {}}})
    for name, graft in grafts.items():
        graft.save(folder / name)
    status, out, _ = run(monkeypatch, capsys, "cite", folder / "by", "--json")
    assert status == 0
    assert json.loads(out) == cite("dft")
    status, out, _ = run(monkeypatch, capsys, "cite", folder / "without")
    assert (status, "no paper" in out) == (0, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("select", "SCORES", "--fraction", "3"), "give --fraction 0.01"),
        (("tune", "MODEL", "DATA", "--where", "SCORES"), "neurograft select FILE"),
        (("tune", "MODEL", "DATA", "--args", "max_steps=three"), "give one, as in max_steps=-1"),
        (("audit", "MODEL", "MODEL"), "give --gain FILE"),
        (("audit", "MODEL", "MODEL", "--keep", "a.jsonl"), "NAME=FILE"),
        (("anatomy",), "a model, or --all"),
        (("locate", "MODEL", "DATA", "--batch-size", "0"), "give --batch-size 8"),
        (("papers", "sft2"), "or 's2ft'"),
    ],
)
def test_advice_is_in_the_words_of_the_command_line(words, expected, folder, monkeypatch, capsys):
    scores = folder / "advice.safetensors"
    run(monkeypatch, capsys, "locate", folder / "model", "--by", "noise", "-o", scores)
    paths = {"MODEL": folder / "model", "DATA": folder / "data.jsonl", "SCORES": scores}
    status, _, err = run(monkeypatch, capsys, *[paths.get(w, w) for w in words])
    assert status == 2
    assert expected in err


def test_help_names_the_methods_and_says_what_options_take(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run(monkeypatch, capsys, "tune", "--help")
    said = " ".join(out.split())
    assert "--adapter NAME[:KEY=VALUE,...] in what shape the change is trained: " in said
    assert "slice" in said.split("is trained: ")[1].split("--objective")[0]
    assert "--args NAME=VALUE" in said
    _, out, _ = run(monkeypatch, capsys, "--help")
    assert "..." not in out.split("Commands:")[1]
    assert out.index("  locate ") < out.index("  tune ") < out.index("  audit ") < out.index("  export ")


def test_methods_of_tune_take_options(folder, monkeypatch, capsys):
    where = folder / "tw.safetensors"
    run(monkeypatch, capsys, "locate", folder / "model", "--by", "noise", "--json", "-o", folder / "ts.safetensors")
    run(monkeypatch, capsys, "select", folder / "ts.safetensors", "--count", 2, "-o", where)
    words = ("--where", where, "--args", "max_steps=2", "--anchor", f"kl:weight=0.5,data={folder / 'data.jsonl'}")
    made = ("tune", folder / "model", folder / "data.jsonl", *words, "-o", folder / "tg")
    status, out, err = run(monkeypatch, capsys, *made, "--adapter", "slice:tie=site")
    assert status == 0, err
    assert "2 steps, loss" in out
    card = json.loads((folder / "tg" / "graft.json").read_text())["card"]
    assert card["adapter"]["options"] == {"tie": "site"}
    assert json.loads(run(monkeypatch, capsys, "plan", folder / "model", where, "--json")[1])["units"]["chosen"] == 2


def test_export_advises_in_its_own_options(folder, monkeypatch, capsys):
    words = ("tune", folder / "model", folder / "data.jsonl", "--args", "max_steps=1", "-o", folder / "dense")
    run(monkeypatch, capsys, *words)
    status, _, err = run(monkeypatch, capsys, "export", folder / "dense", "-o", folder / "lora")
    assert status == 2
    assert "export --to merged" in err
    assert "pass --option partial=true" in err


def test_trim_says_what_it_left_out(folder, monkeypatch, capsys):
    words = ("tune", folder / "model", folder / "data.jsonl", "--args", "max_steps=2", "-o", folder / "whole")
    run(monkeypatch, capsys, *words)
    rules = ("--gain", folder / "data.jsonl", "--keep", f"same={folder / 'data.jsonl'}", "-o", folder / "trimmed")
    status, out, err = run(monkeypatch, capsys, "trim", folder / "model", folder / "whole", *rules)
    assert status == 0, err
    assert "left out: nothing" in out
    assert "after: task +" in out


def test_papers_are_found_by_slug_or_word(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "papers", "s2ft")
    assert "title: S2FT" in out
    assert "options: fraction=0.03" in out
    assert "run: neurograft run s2ft MODEL DATA" in out
    found = json.loads(run(monkeypatch, capsys, "papers", "Sparse", "--json")[1])
    assert 1 < len(found) < 60
    assert all("sparse" in f"{row['slug']} {row['title']} {row['room']}".lower() for row in found)


def test_plan_names_routes_and_bytes(folder, monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "plan", folder / "model", "s2ft", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["trainable"] == sum(row["numbers"] for row in found["parameters"])
    assert {row["route"] for row in found["parameters"]} == {"thin product"}
    assert found["bytes"]["moments"] == 8 * found["trainable"]


def test_an_output_that_cannot_be_written_is_named_before_anything_is_computed(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dir").mkdir()
    model, data = folder / "model", folder / "data.jsonl"
    for dotted in ("neurograft.pipeline.run", *(row[0] for row in VERBS.values())):
        resolve(dotted)  # imported before anything is replaced, or they would keep the replacement
    for place in ("models", "tune"):
        monkeypatch.setattr(f"neurograft.pipeline.{place}.load_model", lambda *args, **more: pytest.fail("computed"))
    for words, expected in {
        ("locate", model, "--by", "noise", "-o", "dir"): "a folder",
        ("tune", model, data, "-o", "file"): "a file",
        ("tune", model, data, "-o", "file/deep/graft"): "below the file",
        ("run", "s2ft", model, data, "-o", "file"): "a file",
        ("audit", model, model, "--gain", data, "-o", "file"): "a file",
        ("locate", model, "--by", "noise", "-o", ""): "an empty path",
        ("locate", model, data, "--fraction", "0"): "more than 0",
    }.items():
        status, out, err = run(monkeypatch, capsys, *words)
        assert status == 2, (words, out, err)
        assert expected in err
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["dir", "file"]


def test_an_empty_option_is_no_input_and_export_may_write_beside_others(folder, monkeypatch, capsys):
    """An empty word once stood for the working directory, in which every output lies."""
    monkeypatch.chdir(folder)
    (folder / "there.safetensors").write_text("old")
    status, _, err = run(monkeypatch, capsys, "locate", "model", "--by", "", "-o", "there.safetensors")
    assert status == 2
    assert "nothing for it" in err
    (folder / "taken").mkdir()
    status, _, err = run(monkeypatch, capsys, "export", "nograft", "-o", "taken")
    assert status == 2
    assert "nograft" in err


def test_an_output_is_a_name_whatever_it_looks_like(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("2024", "1e-3", "true"):
        status, _, err = run(monkeypatch, capsys, "locate", folder / "model", "--by", "noise", "-o", name)
        assert status == 0, err
        assert (tmp_path / name).is_file()


def test_plain_results_are_written_where_a_path_is_given(folder, monkeypatch, capsys):
    for words in (("papers", "s2ft"), ("plan", folder / "model", "s2ft"), ("anatomy", folder / "model")):
        file = folder / "results" / f"{words[0]}.json"
        status, out, err = run(monkeypatch, capsys, *words, "--json", "-o", file)
        assert status == 0, err
        assert json.loads(file.read_text()) == json.loads(out)


def test_errors_that_nobody_foresaw_are_one_line_and_come_with_their_lines_if_asked(folder, monkeypatch, capsys):
    def broken(*args, **more):
        raise TypeError("first line\nsecond line")

    resolve("neurograft.pipeline.locate")  # imported before anything is replaced, or it would keep the replacement
    monkeypatch.setattr("neurograft.pipeline.models.load_model", broken)
    words = ("locate", folder / "model", "--by", "noise")
    status, _, err = run(monkeypatch, capsys, *words)
    assert (status, "the run failed: TypeError: first line" in err, "Traceback" in err) == (1, True, False)
    assert "NEUROGRAFT_TRACEBACK=1" in err
    monkeypatch.setenv("NEUROGRAFT_TRACEBACK", "1")
    with pytest.raises(TypeError):
        run(monkeypatch, capsys, *words)


def test_a_path_the_system_refuses_is_a_wrong_request(folder, monkeypatch, capsys):
    def refused(*args, **more):
        raise PermissionError(13, "Permission denied", "secret.safetensors")

    resolve("neurograft.pipeline.locate")
    monkeypatch.setattr("neurograft.pipeline.models.load_model", refused)
    status, _, err = run(monkeypatch, capsys, "locate", folder / "model", "--by", "noise")
    assert status == 2
    assert "secret.safetensors" in err
    assert "Permission denied" in err


RECIPES = {
    "recipe: [s2ft]": "a text",
    "recipe: s2ft\nsteps: []": "one of them",
    "recipe: s2ft\noptions: 3": "a mapping",
    "recipe: s2ft\nmodel: 7": "a text",
    "steps: 3": "a list",
    "steps: []": "at least one step",
    "steps: [locate]": "'locate'",
    "steps:\n- {by: noise}": "under `do`",
    "steps:\n- {do: locate, byy: noise}": "did you mean 'by'",
    "steps:\n- {do: select, fraction: 0.1}": "before anything made its scores",
    "steps:\n- {do: merge}": "the step 'merge'",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipe_files_that_are_wrong_are_requests(text, folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    out = tmp_path / "out"
    status, _, err = run(
        monkeypatch, capsys, "run", tmp_path / "r.yaml", folder / "model", folder / "data.jsonl", "-o", out
    )
    assert status == 2, err
    assert RECIPES[text] in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--args", "learning_rate=-1"), "at least 0"),
        (("--args", "per_device_train_batch_size=0"), "at least 1"),
        (("--args", "max_steps=0"), "no step"),
        (("--args", "max_steps=1", "--args", "max_steps=2"), "'max_steps' twice"),
        (("--adapter", "lora:r=0"), "a rank of at least 1"),
    ],
)
def test_numbers_that_train_nothing_are_requests(words, expected, folder, monkeypatch, capsys, tmp_path):
    status, _, err = run(
        monkeypatch, capsys, "tune", folder / "model", folder / "data.jsonl", *words, "-o", tmp_path / "g"
    )
    assert status == 2, err
    assert expected in err
