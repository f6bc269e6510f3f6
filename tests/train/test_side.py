"""The side path trains what the in-place route trains: turns to other units, tied vectors, resumes."""

import shutil

import pytest
import torch

import neurograft as ng
from neurograft.core.prompts.collate import collator
from neurograft.core.selection import Selection
from neurograft.core.units import Site
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico

EMBED, GATE, DOWN = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)
NORM = "model.norm.weight"
ROUTES = ("in-place", "side")
# What is trained from which step on; row 5 of the gate stays, 1 returns, the norm is left for good.
TURNS = {
    0: {EMBED: ("row", [3, 9]), GATE: ("row", [1, 5]), NORM: ("weight", [0, 7])},
    2: {GATE: ("row", [5, 9]), DOWN: ("weight", range(0, 1536, 31))},
    4: {EMBED: ("row", [9, 30]), GATE: ("column", [1, 9]), DOWN: ("column", [3])},
    6: {GATE: ("row", [1]), DOWN: ("row", [2, 4])},
}


def batch_of(model, examples):
    return collator(model)(examples(model)[:4])


@pytest.mark.parametrize("values", ["keep", "rewind"])
def test_turns_to_other_units(values, pick, examples, unmoved):
    reached = {}
    for route in ROUTES:
        model, seen, asked = pico("llama", dtype=torch.float64), [], []
        found, batch = unmoved(model), batch_of(model, examples)
        rest = model(**batch).logits.detach()

        def ask(net, step, asked=asked):
            """What a locator sees are the values trained so far."""
            asked.append({n: net.get_parameter(n).detach().clone() for n in (EMBED, GATE, DOWN, NORM)})
            asked.append({"logits": net(**batch).logits.detach()})  # noqa: B023
            return pick(net, TURNS[step])

        with ng.attach(model, pick(model, TURNS[0]), route=route) as live:
            turn = {"steps": 2, "values": values, "moments": "keep" if values == "keep" else "drop"}
            run = fit(
                live,
                [batch],
                steps=8,
                lr=1e-2,
                weight_decay=0.1,
                schedule=("every", turn),
                reselect=ask,
                evaluate=lambda step: seen.append(model(**batch).logits.detach()),  # noqa: B023
            )
            ended = live.rest()
            torch.testing.assert_close(model(**batch).logits.detach(), rest, rtol=0, atol=0)
            ended()
            assert torch.equal(model(**batch).logits.detach(), seen[-1])
            with torch.no_grad():
                torch.testing.assert_close(model(**batch).logits, seen[-1], rtol=0, atol=1e-12)
            kept = {n: (t.values.detach(), t.original) for n, t in live.held().items()}
            graft, state = live.graft(), live.state_dict()
            same = all(torch.equal(v, found.values[k]) for k, v in model.state_dict().items())
            assert same is (route == "side")
        found.check()
        with ng.attach(model, pick(model, TURNS[0]), route=route) as live:
            live.load_state_dict(state)
            torch.testing.assert_close(model(**batch).logits.detach(), seen[-1], rtol=0, atol=1e-12)
            assert live.graft().identity == graft.identity
        found.check()
        with graft.on(model):
            torch.testing.assert_close(model(**batch).logits.detach(), seen[-1], rtol=0, atol=1e-12)
        reached[route] = run, seen, asked, kept, state, {n: d.tensors() for n, d in graft.deltas.items()}
    torch.testing.assert_close(reached["side"], reached["in-place"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("route", ROUTES)
def test_a_refused_turn_leaves_entries_that_returned_as_they_are(route, pick, examples):
    model = pico("llama", dtype=torch.float64)
    batch = batch_of(model, examples)
    with ng.attach(model, pick(model, TURNS[0]), route=route) as live:
        for step in (2, 6):
            fit(live, [batch], steps=1, lr=1e-2)
            live.reselect(lambda step=step: pick(model, TURNS[step]))
        fit(live, [batch], steps=1, lr=1e-2)
        state, seen = live.state_dict(), model(**batch).logits.detach()
        for ask in (lambda: pick(model, {GATE: ("row", [])}), lambda: 1 / 0):
            with pytest.raises((ng.RequestError, ZeroDivisionError)):
                live.reselect(ask)
        assert torch.equal(model(**batch).logits.detach(), seen)
        torch.testing.assert_close(live.state_dict(), state, rtol=0, atol=0)


def test_a_turn_through_the_trainer_and_its_resume(pick, examples, tmp_path):
    """Located on what has been trained; a checkpoint lies before, at and after a turn."""
    reached = {}
    for route in ROUTES:
        model, folder = pico("llama", dtype=torch.float64), tmp_path / route

        def run(model=model, folder=folder, route=route, **more):
            return ng.tune(
                model,
                examples(model),
                pick(model, TURNS[0]),
                adapter=("slice", {"route": route}),
                schedule=("every", {"steps": 3}),
                reselect={"locate": {"by": "grad_x_act", "units": "neuron"}, "select": {"count": 5}},
                args={
                    "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True,
                    "output_dir": str(folder), "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.0,
                },
                **more,
            )  # fmt: skip

        straight = run()
        reached[route] = straight.card["losses"], {n: d.tensors() for n, d in straight.deltas.items()}
        for last in (6, 2):
            for folder_ in folder.iterdir():
                if int(folder_.name.split("-")[1]) > last:
                    shutil.rmtree(folder_)
            assert run(resume_from_checkpoint=True).identity == straight.identity, (route, last)
    torch.testing.assert_close(reached["side"], reached["in-place"], rtol=0, atol=1e-8)


def grouped(model, pick):
    """Rows, columns and norm entries in two groups each; a table, too."""
    sites, ids = {}, {}
    for name, kind, groups in (
        (EMBED, "row", [[3, 9], [1, 4, 5]]),
        (GATE, "row", [[1, 5, 40], [2, 3]]),
        (DOWN, "column", [[0, 7], [9]]),
        (NORM, "weight", [[0, 7, 8], [31]]),
    ):
        for number, chosen in enumerate(groups):
            site = next(iter(pick(model, {name: (kind, [])}).sites.values()))
            sites[f"{name}/{number}"] = Site(f"{name}/{number}", kind, site.n, site.parts)
            ids[f"{name}/{number}"] = chosen
    return Selection.of(sites, ids)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_tied_vectors_beside_the_weight(decay, pick, examples, unmoved):
    reached = {}
    for route in ROUTES:
        model = pico("llama", dtype=torch.float64)
        found, batch = unmoved(model), batch_of(model, examples)
        rest = model(**batch).logits.detach()
        with ng.attach(model, grouped(model, pick), tie="site", route=route) as live:
            losses = fit(live, [batch], steps=4, lr=1e-2, weight_decay=decay, anchor=("pull", {"weight": 0.1}))
            seen = model(**batch).logits.detach()
            assert all(p.any() for p in live.parameters())
            same = all(torch.equal(v, found.values[k]) for k, v in model.state_dict().items())
            assert same is (route == "side")
            model.load_state_dict(model.state_dict())
            torch.testing.assert_close(model(**batch).logits.detach(), seen, rtol=0, atol=1e-12)
            ended = live.rest()
            assert torch.equal(model(**batch).logits.detach(), rest)
            ended()
            values = {n: t.values.detach() for n, t in live.held().items()}
            graft, state = live.graft(), live.state_dict()
        found.check()
        with graft.on(model):
            torch.testing.assert_close(model(**batch).logits.detach(), seen, rtol=0, atol=1e-6)  # factors are float32
        reached[route] = losses, seen, values, state, {n: d.tensors() for n, d in graft.deltas.items()}
    torch.testing.assert_close(reached["side"], reached["in-place"], rtol=0, atol=1e-9)
