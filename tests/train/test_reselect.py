"""Turning to other units in the middle of a training: what stays, what stops, what is carried over."""

import itertools
import shutil

import pytest
import torch

import neurograft as ng
from neurograft.core.prompts.collate import collator
from neurograft.train.checkpoint import mark, write
from neurograft.train.conductor import Conductor
from neurograft.train.loop import fit
from neurograft.train.mixin_files import Files
from neurograft.train.moved import Witness
from neurograft.worlds.pico import pico

GATE, DOWN = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"
TURNS = {0: {GATE: ("row", [1, 5])}, 2: {GATE: ("row", [5, 9])}, 4: {GATE: ("row", [1, 9]), DOWN: ("column", [3])}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_left_behind_stay_and_stop_moving(dtype, pick, examples, unmoved):
    model = pico("llama", dtype=dtype)
    found, batch = unmoved(model), collator(model)(examples(model)[:4])
    base = {k: v.clone() for k, v in model.state_dict().items()}
    history = []
    with ng.attach(model, pick(model, TURNS[0])) as live:
        fit(
            live,
            [batch],
            steps=6,
            lr=1e-2,
            weight_decay=0.1,
            schedule=("every", {"steps": 2}),
            reselect=lambda net, step: pick(net, TURNS[step]),
            evaluate=lambda step: history.append({k: v.clone() for k, v in model.state_dict().items()}),
        )
        seen = model(**batch).logits.detach()
        ended = live.rest()
        assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
        ended()
        assert torch.equal(model(**batch).logits, seen)
        graft = live.graft()
    found.check()
    rows = [set((h[GATE] != base[GATE]).any(1).nonzero().reshape(-1).tolist()) for h in history]
    assert rows == [{1, 5}, {1, 5}, {1, 5, 9}, {1, 5, 9}, {1, 5, 9}, {1, 5, 9}]
    steps = itertools.pairwise(history)
    moving = [set((b[GATE] != a[GATE]).any(1).nonzero().reshape(-1).tolist()) for a, b in steps]
    assert moving == [{1, 5}, {5, 9}, {5, 9}, {1, 9}, {1, 9}]
    assert graft.deltas[GATE].region.ids.tolist() == [1, 5, 9]
    assert graft.deltas[DOWN].region.ids.tolist() == [3]
    with graft.on(model):
        assert torch.equal(model(**batch).logits, seen)
    found.check()
    again = live.graft()
    assert again.identity == graft.identity


def test_the_masters_of_entries_that_return_are_the_ones_left(pick, examples):
    """On a bfloat16 base the float32 values go on, not their roundings."""
    model = pico("llama", dtype=torch.bfloat16)
    batch = collator(model)(examples(model)[:4])
    with ng.attach(model, pick(model, TURNS[0])) as live:
        fit(live, [batch], steps=2, lr=1e-3)
        left = live.trained()[GATE].detach().clone()
        live.reselect(lambda: pick(model, {GATE: ("row", [9])}))
        live.reselect(lambda: pick(model, {GATE: ("row", [1, 9])}))
        now = live.trained()[GATE].detach()
        assert torch.equal(now[0], left[0])
        assert not torch.equal(now[0], now[0].bfloat16().float())


@pytest.mark.parametrize("moments", ["keep", "drop"])
def test_moments_of_entries_that_stay(moments, pick, examples):
    model = pico("llama")
    batch = collator(model)(examples(model)[:4])
    seen = []

    class Seen(torch.optim.AdamW):
        def step(self, closure=None):
            (group,) = self.param_groups
            seen.append({k: v.clone() for k, v in self.state.get(group["params"][0], {}).items()})
            out = super().step(closure)
            seen.append({k: v.clone() for k, v in self.state[group["params"][0]].items()})
            return out

    with ng.attach(model, pick(model, TURNS[0])) as live:
        fit(
            live,
            [batch],
            steps=3,
            optimizer=Seen,
            schedule=("every", {"steps": 2, "moments": moments}),
            reselect=lambda net, step: pick(net, {GATE: ("row", [5, 9])}),
        )
    before, after = seen[3], seen[4]
    if moments == "drop":
        assert after == {}
        return
    assert after["step"] == 2
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][0], before[name][1])  # row 5
        assert not after[name][1].any()  # row 9 is new


def test_tensors_that_a_turn_brings_decay_as_their_kind_does(pick, examples):
    model, norm, seen = pico("llama"), "model.norm.weight", []

    class Seen(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append({g["name"]: (g["weight_decay"], g["lr"]) for g in self.param_groups})
            return super().step(closure)

    turns = {0: {GATE: ("row", [1])}, 1: {norm: ("row", [3]), DOWN: ("column", [2]), GATE: ("row", [1])}}
    with ng.attach(model, pick(model, turns[0])) as live:
        fit(
            live,
            [collator(model)(examples(model)[:4])],
            steps=2,
            lr=1e-2,
            weight_decay=0.1,
            optimizer=Seen,
            schedule=("every", {"steps": 1}),
            reselect=lambda net, step: pick(net, turns[step]),
        )
    assert seen == [{GATE: (0.1, 1e-2)}, {GATE: (0.1, 1e-2), DOWN: (0.1, 1e-2), norm: (0.0, 1e-2)}]


@pytest.mark.parametrize("steps", [3, 2])
def test_resumed_across_a_turn_equals_uninterrupted(steps, pick, examples, tmp_path):
    """With the locator asked in the middle; a checkpoint lies before, at and after a turn."""
    model = pico("llama", dtype=torch.bfloat16, attention_dropout=0.1)
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in (0, 1)]

    def ask(net, step):
        sites = pick(net, {n: ("row", []) for n in names}).sites
        values = {n: net.get_parameter(n).detach().float().norm(dim=1) for n in names}
        scores = ng.Scores(sites, values)
        return scores.top(count=6) if step // steps % 2 else scores.bottom(count=4)

    def run(**more):
        return ng.tune(
            model,
            examples(model),
            pick(model, TURNS[0]),
            schedule=("every", {"steps": steps}),
            reselect=ask,
            args={
                "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "output_dir": str(tmp_path),
                "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "weight_decay": 0.1, "bf16": True,
            },
            **more,
        )  # fmt: skip

    straight = run()
    assert straight.numel > 8 * 32  # more rows than were ever live at once
    for last in (6, 4, 2):
        shutil.rmtree(tmp_path / f"checkpoint-{last + 2}")
        resumed = run(resume_from_checkpoint=True)
        assert resumed.identity == straight.identity, last
        assert resumed.card["losses"] == straight.card["losses"]
        for folder in tmp_path.iterdir():
            if int(folder.name.split("-")[1]) > last:
                shutil.rmtree(folder)


def test_a_resume_finds_the_state_of_every_tensor(pick, examples, tmp_path):
    """Neurons own rows and columns of six weights, whose names are not in the model's order in a checkpoint's file."""
    model = pico("llama")

    def run(**more):
        return ng.tune(
            model,
            examples(model),
            ng.select(ng.locate(model, by="noise"), count=4),
            schedule=("every", {"steps": 1}),
            reselect={"locate": {"by": "noise"}, "select": {"count": 9}},
            args={
                "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "output_dir": str(tmp_path),
                "save_strategy": "steps", "save_steps": 2, "use_cpu": True,
            },
            **more,
        )  # fmt: skip

    straight = run()
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert run(resume_from_checkpoint=True).identity == straight.identity
    shutil.rmtree(tmp_path / "checkpoint-4")
    saved = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(saved, weights_only=True)
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:1]
    torch.save(state, saved)
    mark(tmp_path / "checkpoint-2")
    with pytest.raises(ng.RequestError, match="moments of shape"):
        run(resume_from_checkpoint=True)


def test_after_a_turn_to_as_many_units_a_resume_watches_the_ones_trained_now(pick, tmp_path):
    """Their tensors have the first ones' shapes: what was noted at the start is of other numbers."""
    model = pico("llama")
    with ng.attach(model, pick(model, TURNS[0])) as live:
        live.reselect(lambda: pick(model, TURNS[2]))
        write(tmp_path, live, {"losses": [1.0], "reached": [GATE], "awake": [GATE], "schedule": None})
    with ng.attach(model, pick(model, TURNS[0])) as live:
        run = Files()
        run.mount, run.witness, run.conductor = live, Witness(live), Conductor(None, live)
        run._load_from_checkpoint(str(tmp_path))
        assert live.regions()[GATE].ids.tolist() == [5, 9]
        assert torch.equal(run.witness.start[GATE], live.trained()[GATE])
        run.witness.awake = run.witness.reached = {GATE}
        with pytest.raises(ng.RunError, match="did not move"):
            run.witness.check()


def test_what_is_protected_or_tied_is_so_after_a_turn_too(pick):
    model = pico("llama")
    with ng.attach(model, pick(model, TURNS[0]), protect=pick(model, {GATE: ("row", [9])})) as live:
        live.reselect(lambda: pick(model, {GATE: ("row", [5, 9])}))
        assert live.regions()[GATE].ids.tolist() == [5]
        with pytest.raises(ng.RequestError, match="protected"):
            live.reselect(lambda: pick(model, {GATE: ("row", [9])}))
    tied, name = pico("gpt2", tie_word_embeddings=True), "transformer.wte.weight"
    for rule in ("refuse", "both"):
        first = {"transformer.h.0.attn.c_proj.weight": ("row", [1])}
        with ng.attach(tied, pick(tied, first), tied=rule) as live:
            if rule == "refuse":
                with pytest.raises(ng.RequestError, match="tied"):
                    live.reselect(lambda: pick(tied, {name: ("row", [3])}))
            else:
                live.reselect(lambda: pick(tied, {name: ("row", [3])}))
                assert list(live.regions()) == [name]


def test_a_rewound_turn_starts_from_the_base(pick, examples, unmoved):
    """What was trained before names the units and is then taken back; a checkpoint holds it."""
    model = pico("llama")
    found, base = unmoved(model), {k: v.clone() for k, v in model.state_dict().items()}
    batch, asked = collator(model)(examples(model)[:4]), []

    def ask(net, step):
        asked.append((net.get_parameter(GATE).detach() != base[GATE]).any(1).nonzero().reshape(-1).tolist())
        return pick(net, {GATE: ("row", [5, 9])})

    turn = ("every", {"steps": 2, "until": 2, "values": "rewind", "moments": "drop"})
    with ng.attach(model, pick(model, TURNS[0])) as live:
        fit(live, [batch], steps=3, lr=1e-3, schedule=turn, reselect=ask, max_norm=None)
        now = model.state_dict()[GATE].clone()
        graft = live.graft()
        state = live.state_dict()
    found.check()
    assert asked == [[1, 5]]
    assert (now != base[GATE]).any(1).nonzero().reshape(-1).tolist() == [5, 9]
    assert float((now - base[GATE]).abs().max()) < 1.001e-3  # one step of AdamW from the base
    assert graft.deltas[GATE].region.ids.tolist() == [5, 9]
    with ng.attach(model, pick(model, TURNS[0])) as live:
        live.load_state_dict(state)
        assert torch.equal(model.state_dict()[GATE], now)
        assert live.state_dict().keys() == state.keys()


def test_located_anew_by_plain_data(pick, examples, unmoved):
    model = pico("llama")
    found = unmoved(model)
    graft = ng.tune(
        model,
        examples(model),
        pick(model, TURNS[0]),
        schedule=("every", {"steps": 2}),
        reselect={"locate": {"by": "magnitude", "units": "row", "match": "*gate*"}, "select": {"count": 3}},
        args={"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
    )
    found.check()
    assert graft.card["schedule"]["path"].endswith("every")


def test_turns_that_cannot_be_made(pick, examples, unmoved):
    model = pico("llama")
    found, batch = unmoved(model), collator(model)(examples(model)[:4])
    turn = {"schedule": ("every", {"steps": 1})}
    with ng.attach(model, pick(model, TURNS[0])) as live, pytest.raises(ng.RequestError, match="reselect="):
        fit(live, [batch], steps=2, **turn)
    with ng.attach(model, adapter="lora") as live, pytest.raises(ng.RequestError, match="not tied"):
        fit(live, [batch], steps=2, reselect=lambda net, step: pick(net, TURNS[2]), **turn)
    with ng.attach(model, pick(model, TURNS[0])) as live:
        with pytest.raises(ng.RequestError, match="touches no parameter"):
            fit(live, [batch], steps=2, reselect=lambda net, step: pick(net, {GATE: ("row", [])}), **turn)
        fit(live, [batch], steps=1)  # a refused turn leaves the mount as it was
    with pytest.raises(ng.RequestError, match="'locate' and 'select'"):
        ng.tune(model, examples(model), pick(model), reselect={"by": "noise"}, **turn)
    found.check()
