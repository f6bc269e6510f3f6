"""Laws of recipes: known papers, sound defaults, and each runs on families that its proof never saw.

From a saved model folder with a user's JSONL, through `ng.run` and through the command line, to one graft.
"""

import json
from pathlib import Path

import pytest
import torch
from tests._command import graft_of_command

import neurograft as ng
from neurograft.core.choose import option_names
from neurograft.core.resolve import resolve
from neurograft.pipeline.papers import card, known
from neurograft.pipeline.recipe import recipe, recipes
from neurograft.worlds.letters import letters
from neurograft.worlds.pico import pico, pico_batch

FAMILIES = {
    "text-generation": ("gpt2", "qwen2"),
    "text-classification": ("roberta", "distilbert"),
    "image-classification": ("convnext", "vit"),
}
ROWS = {
    "text-generation": [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(2)],
    "text-classification": [{"text": f"{a} and {b}", "label": (a + b) % 3} for a in range(4) for b in range(2)],
    "image-classification": [
        {"pixel_values": torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(a)).tolist(), "labels": a % 3}
        for a in range(8)
    ],
}
# Recipes whose cards need a contrast find it in the same rows: two sets that share no row.
PAIRED = {
    k: [{**r, "positive": v[i // 2], "negative": v[4 + i // 2]} for i, r in enumerate(v)] for k, v in ROWS.items()
}
# Recipes about choices read scenarios; what they ask takes more places than the pico models have.
SCENARIOS = [
    {"name": n, "question": "which?", "attributes": [{"name": a, "range": [0, 10]} for a in ("cost", "size")]}
    for n in ("pen", "cup", "hat", "bag")
]
LONG = {"gpt2": {"n_positions": 1536}, "qwen2": {"max_position_embeddings": 1536}}
# What makes eight rows and one pass move something, whatever the paper's learning rate and warm-up; what an untrained
# model answers is measured by probability, and no head of its circuits has to be needed.
BRISK = {
    "lr": 1e-2,
    "warmup": 0.0,
    "epochs": 1,
    "batch": 4,
    "probe_epochs": 50,
    "metric": "probability",
    "prune": False,
    "iterations": 6,
    "reports": 1,
    "trials": 4,
}
OWN = {"milan": {"query": "e"}}  # half of the descriptions of anything have an "e"


def changes_of(name):
    mine = option_names(resolve(f"neurograft.recipes.{name}"))
    brisk = {k: v for k, v in BRISK.items() if k in mine and not (k == "warmup" and isinstance(mine[k].default, str))}
    return brisk | OWN.get(name, {})


CASES = [(n, f) for n in recipes() if card(n).task for f in FAMILIES[card(n).task]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return family -> a saved model folder and a JSONL file, made when first asked for."""
    made = {}

    def folder(family, task, needs=frozenset()):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            pico(family, **LONG.get(family, {})).save_pretrained(path / "model")
            letters().save_pretrained(path / "model")
            (path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS[task])))
            (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRED[task])))
            (path / "scenarios.jsonl").write_text("\n".join(map(json.dumps, SCENARIOS)))
            made[family] = path
        file = "pairs" if "contrast" in needs else "scenarios" if "scenarios" in needs else "data"
        return made[family] / "model", made[family] / f"{file}.jsonl"

    return folder


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_plain_data_of_a_known_paper(name):
    made = recipe(name)
    assert made.name == name
    assert made.paper == card(name).paper
    if made.paper is not None:
        assert made.paper in known()
        assert name == made.paper.replace("-", "_")
    json.dumps(made.steps)
    json.dumps(made.as_dict())
    assert resolve(f"neurograft.recipes.{name}").__doc__


@pytest.mark.parametrize("name", [n for n in recipes() if card(n).paper])
def test_the_proof_has_not_seen_these_families(name):
    file = Path(__file__).parents[1] / "proofs" / f"test_{name}.py"
    assert file.is_file(), f"{name} names a paper, so it needs a proof: write tests/proofs/{file.name}"
    text = file.read_text()
    assert not any(f'"{family}"' in text for family in FAMILIES.get(card(name).task, ()))


@pytest.mark.parametrize(("name", "family"), CASES, ids=["-".join(c) for c in CASES])
def test_it_runs_on_two_other_families_from_python_and_the_command_line(name, family, saved):
    model, data = saved(family, card(name).task, card(name).needs)
    changes = changes_of(name)
    graft = ng.run(name, str(model), str(data), changes=changes).graft
    assert graft.numel > 0
    assert graft.card["recipe"]["name"] == name
    assert graft.card["recipe"]["options"].items() >= changes.items()
    same = graft_of_command(name, model, data, changes, model.parent / f"{name}-graft")
    assert same.identity == graft.identity
    net = type(pico(family)).from_pretrained(model).eval()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    inputs = {k: v for k, v in pico_batch(net).items() if k != "labels"}
    with torch.no_grad():
        said = net(**inputs).logits
        with same.on(net):
            changed = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]
            assert changed if same.deltas else same.operations
            assert not torch.equal(net(**inputs).logits, said)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
