"""Instruction vectors: found, added and drifting in a tiny decoder of one-letter tasks, and a tuning guided by them.

A prompt is `<bos> task a b <sep>`, the answer a letter made of b alone: b itself, the next, its mirror image, the
first of its group of four, the third after it (which the base has met one time in two hundred). A prompt that lacks the
instruction has a token there that was never trained. Tried first and given up: the task token behind the letters,
where it computes the answer itself and no vector is needed; answers of two letters, whose second one is read off the
first; tasks that choose between a and b; an uninstructed prompt with a meaning of its own in the base's training.
With three blocks the vector has to stand before the first FFN (at="attention"); behind the block it comes too late.

What the table over sign and divergence shows here: the divergence does the keeping. At sign -1 with it the other four
tasks keep .71, .77 and .44 on the three seeds, plain tuning .34, .41 and .39, each at full accuracy on the new task;
without any student intervention the divergence keeps .88, .88 and .68, and an intervention alone keeps less than plain
tuning. The paper's overlay claim does not hold in this world: with the instruction's vector put back after plain
tuning next to nothing of what was lost returns, and knowledge was lost as much as the instruction.
"""

import json
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import neurograft as ng
from neurograft.anatomy.sites import sites
from neurograft.audits.instruction_split import instruction_split
from neurograft.audits.vector_drift import vector_drift
from neurograft.core.choose import choose
from neurograft.core.context import Context, Step
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.graft import Graft
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.taps.end_states import answer_scores, effects, end_means, written
from neurograft.core.taps.instructed import additions, at_prompt_end, prompt_end
from neurograft.locators.causal_effect import causal_effect
from neurograft.objectives.guided import divergence, guided, stair
from neurograft.pipeline.attach import attach
from neurograft.pipeline.instructed import instructed
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.train.steps import reference_of
from neurograft.worlds.mixture import BOS, LETTER, SEP, TASK, padded
from neurograft.worlds.pico import pico
from neurograft.worlds.tiny import fit as plain_fit
from neurograft.worlds.tiny import llama
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import moved, said, snapshot

PAPER, SCALE = "instruction-vector", "identity"


@contextmanager
def the_divergence_is_turned_round():
    """KL(teacher || student) in the place of KL(student || teacher)."""
    plain = resolve("neurograft.objectives.guided.divergence")
    with patched("neurograft.objectives.guided", "divergence", lambda s, t, temperature=1.0: plain(t, s, temperature)):
        yield


@contextmanager
def the_teacher_lacks_the_vector():
    """The base is asked as it is."""
    plain = resolve("neurograft.core.taps.instructed.at_prompt_end")

    def without(model, operations, where, strength=0.0):
        return plain(model, operations, where, strength)

    with patched("neurograft.objectives.guided", "at_prompt_end", without):
        yield


@contextmanager
def the_means_are_taken_over_every_token():
    """A head's mean is that of the whole prompt and the answer."""
    plain = resolve("neurograft.core.taps.stream.means")
    with patched("neurograft.core.taps.end_states", "means", lambda m, s, b, mask=None: plain(m, s, b)):
        yield


BROKEN = (the_divergence_is_turned_round, the_teacher_lacks_the_vector, the_means_are_taken_over_every_token)

KINDS, NONE = 16, TASK + 7
TASKS = {
    "copy": lambda b: b,
    "next": lambda b: (b + 1) % KINDS,
    "reverse": lambda b: KINDS - 1 - b,
    "first": lambda b: b // 4 * 4,
    "skip": lambda b: (b + 3) % KINDS,
}
KNOWN, LEARNED = ("copy", "next", "reverse", "first"), "skip"


def rows(*tasks, count=1, batch=64, seed=0, bare=False, weights=None):
    """Batches of prompts and one-letter answers; bare ones lack the instruction."""
    rng, found = generator(seed, "rows", *tasks), []
    shares = torch.ones(len(tasks)) if weights is None else torch.tensor(weights)
    for _ in range(count):
        made = []
        for pick in torch.multinomial(shares, batch, True, generator=rng).tolist():
            a, b = torch.randint(KINDS, (2,), generator=rng).tolist()
            word = NONE if bare else TASK + list(TASKS).index(tasks[pick])
            made.append(([BOS, word, LETTER + a, LETTER + b, SEP], [LETTER + TASKS[tasks[pick]](b)]))
        found.append(padded(made))
    return found


@cache
def base(seed):
    """A decoder of 3 blocks and 24 heads that knows four tasks and a little of the fifth; shared, left as found."""
    model = llama(seed, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    return plain_fit(model, rows(*TASKS, count=220, seed=seed, weights=[1.0, 1.0, 1.0, 1.0, 0.02]), lr=4e-3)


def prepare():
    base(0)


def accuracy(model, batches, vector=None):
    """Share of right answers, the vector added where the prompt ends."""
    with torch.no_grad(), at_prompt_end(model, additions(vector), None):
        hits = [model(**b).logits[:, -2].argmax(-1) == b["labels"][:, -1] for b in batches]
    return float(torch.cat(hits).float().mean())


def found_for(model, task, *, seed=5, measure="nll"):
    """What the recipe's first steps find for an instruction: heads, their means and theta, and both as grafts."""
    pos, neg = rows(task, seed=seed), rows(task, seed=seed, bare=True)
    scores = causal_effect(Context(model, sites(model, "head"), pos, neg), measure=measure)
    out = instructed({"scores": scores, "model": model, "data": pos}, layer=0, at="attention")
    out["vector"] = ng.intervene(model, out["heads"], "add", value=out["means"], positions="last").graft()
    out["inserted"] = ng.intervene(model, out["stream"], "add", value=out["theta"], positions="last").graft()
    return out


def test_the_heads_write_the_attentions_output_and_one_slice_adds_what_it_writes():
    for family in ("llama", "gpt_neox"):
        model = pico(family)
        site = next(iter(sites(model, "head").values()))
        module, width = model.get_submodule(site.tap.module), site.tap.width
        h = torch.randn(site.n, width, generator=generator(0, "h"))
        with torch.no_grad():
            bias = module(torch.zeros(1, h.numel()))[0]
            parts = [written(model, site, torch.tensor([i]), h[i : i + 1]) for i in range(site.n)]
            torch.testing.assert_close(torch.stack(parts).sum(0) + bias, module(h.reshape(1, -1))[0])
            m = torch.randn(1, width, generator=generator(1, "m"))
            more = h.clone()
            more[2] += m[0]
            behind = module(h.reshape(1, -1))[0] + written(model, site, torch.tensor([2]), m)
            torch.testing.assert_close(module(more.reshape(1, -1))[0], behind)
    model = pico("llama")
    site = next(iter(sites(model, "head").values()))
    literal = (
        model.get_parameter(site.tap.module + ".weight").detach()[:, 3 * site.tap.width :] @ m[0, : site.tap.width]
    )
    torch.testing.assert_close(written(model, site, torch.tensor([3]), m[:, : site.tap.width]), literal)


def hooked(model, site, batch, change=None):
    """What enters the output projection, by a hook of torch's own, [B, T, n, w]; the logits under a change of it."""
    seen = []

    def before(module, args):
        z = args[0].reshape(*args[0].shape[:2], site.n, site.tap.width).clone()
        if change is not None:
            change(z)
        seen.append(z)
        return (z.reshape(args[0].shape),)

    handle = model.get_submodule(site.tap.module).register_forward_pre_hook(before)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    handle.remove()
    return seen[0], logits


def uneven():
    """Two rows of different length; their prompts end at 3 and 1."""
    return padded([([BOS, 5, 30, SEP], [31]), ([BOS, SEP], [40, 41, 42])])


def test_means_and_effects_are_those_of_plain_hooks_at_the_last_prompt_token():
    model, batch = pico("llama"), uneven()
    assert prompt_end(batch).int().tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]
    heads = sites(model, "head")
    values = end_means(model, heads, [batch])
    (name, site), other = next(iter(heads.items())), uneven()
    z, logits = hooked(model, site, batch)
    torch.testing.assert_close(values[name], (z[0, 3] + z[1, 1]) / 2)
    other["input_ids"][:, 0] = 7
    found = {m: effects(model, heads, [other], values, measure=m)[name] for m in ("probability", "nll")}

    def literal(logits):
        p = logits.softmax(-1)
        tokens = [[p[0, 3, 31].log()], [p[1, t, token].log() for t, token in ((1, 40), (2, 41), (3, 42))]]
        first = torch.stack([p[0, 3, 31], p[1, 1, 40]]).mean()
        return {"probability": first, "nll": torch.stack([torch.stack(t).mean() for t in tokens]).mean()}

    _, logits = hooked(model, site, other)
    before = literal(logits)
    for unit in range(site.n):

        def put(z, unit=unit):
            z[0, 3, unit] = z[1, 1, unit] = values[name][unit]

        after = literal(hooked(model, site, other, put)[1])
        for measure, gains in found.items():
            assert float(gains[unit]) == pytest.approx(float(after[measure] - before[measure]), abs=1e-6)


def test_the_stairs_in_integers():
    """1 on [0, 1/4), ten equal stairs, 0 after 3/4, eleven values, mean just under one half; 0.7 at two fifths."""
    found = [stair(s, 400) for s in range(400)]
    assert set(found[:101]) == {1.0}
    assert found[100:300] == [1.0] + [(9 - i // 20) / 10 for i in range(199)]
    assert set(found[300:]) == {0.0}
    assert len(set(found)) == 11
    assert sum(found) == pytest.approx(101 + 20 * 4.5)  # 0.4775 of the steps
    assert stair(160, 400) == stair(2, 5) == 0.7
    assert all(a >= b for m in (1, 7, 33) for a, b in zip(*[[stair(s, m) for s in range(i, m + i)] for i in (0, 1)]))
    with pytest.raises(RequestError, match="unknown length"):
        stair(0, 0)


def test_the_divergence_is_of_the_student_from_the_teacher():
    """p = (.5, .5), q = (.25, .75): .5 ln 2 + .5 ln 2/3 = 0.1438, not 0.1308; at all positions but the last."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()

    def pull(positions, reduce, **options):
        logits, labels = p.expand(positions, 2), torch.zeros(positions, dtype=torch.long)
        step = said(logits, labels)
        step.reference = lambda ask: q.expand(1, positions + 1, 2)
        weights = {"temperature": 1.0, "reduce": reduce, **options}
        with torch.no_grad():
            return float(guided(step, **weights) - guided(step, weight=0.0)), step

    hand = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    once, step = pull(3, "sum")
    assert once == pytest.approx(3 * float(hand), abs=1e-5)
    assert pull(6, "sum")[0] == pytest.approx(2 * once, abs=1e-5)
    assert pull(6, "mean")[0] == pytest.approx(pull(3, "mean")[0]) == pytest.approx(float(hand), abs=1e-5)
    assert pull(3, "sum", weight=0.5)[0] == pytest.approx(0.5 * once, abs=1e-5)
    assert pull(3, "mean", weight=0.0, end_weight=2.0)[0] == pytest.approx(2 * float(hand), abs=1e-5)
    assert pull(3, "mean", floor=0.1)[0] > 0 == pull(3, "mean", floor=0.15)[0]
    step.items = 6  # in a window of twice as many labels it counts half
    with torch.no_grad():
        assert float(guided(step, temperature=1.0) - guided(step, weight=0.0)) == pytest.approx(once / 2, abs=1e-5)
    step.items = None
    soft = float(divergence(p, q, 2.0))
    assert pull(3, "mean", temperature=2.0)[0] == pytest.approx(soft, abs=1e-5)  # no factor T^2
    step.batch["attention_mask"] = torch.tensor([[1, 1, 1, 0]])  # padding behind
    with torch.no_grad():
        less = float(guided(step, temperature=1.0) - guided(step, weight=0.0))
    assert less == pytest.approx(2 * float(hand), abs=1e-5)


def steps_of(model, where, steps=6, **choice):
    with attach(model, where, adapter=("lora", {"r": 4})) as live:
        losses = fit(live, rows(LEARNED, count=4, batch=16, seed=1), steps=steps, lr=1e-2, **choice)
        return losses, live.graft().identity


def test_without_weight_and_strength_it_is_plain_tuning_step_for_step():
    model, before = base(0), snapshot(base(0))
    plain = steps_of(model, None, objective="likelihood")
    vector = found_for(model, "copy")["vector"]
    assert steps_of(model, None, objective=("guided", {"vector": vector, "weight": 0.0, "sign": 0})) == plain
    with patched("neurograft.objectives.guided", "stair", lambda step, steps: 0.0):  # alpha = 0 throughout
        assert steps_of(model, None, objective=("guided", {"vector": vector, "weight": 0.0})) == plain
    assert steps_of(model, None, objective=("guided", {"vector": vector, "weight": 0.0})) != plain
    assert not moved(before, model)


def test_a_zero_adapter_and_no_vector_give_no_divergence_and_the_teacher_has_the_vector_once():
    model, (batch,) = base(0), rows("copy", "next", batch=16, seed=2)
    vector = found_for(model, "reverse")["vector"]
    nothing = replace(vector, operations=tuple(replace(o, value=0 * o.value) for o in vector.operations))
    with attach(model, None, adapter=("lora", {"r": 4})) as live:

        def loss(change, at=0, **options):
            step = Step(model, batch, at, 20, reference=reference_of(live))
            with torch.no_grad():
                return float(guided(step, vector=change, **options))

        plain = loss(None, weight=0.0)
        assert loss(nothing) == pytest.approx(plain, abs=1e-6)
        # At full strength and sign 1 the student is the teacher; late in the training it is the base.
        assert loss(vector, sign=1) == pytest.approx(loss(vector, weight=0.0, sign=1), abs=1e-5)
        assert loss(vector, weight=0.0, at=15) == pytest.approx(plain, abs=1e-6)
        apart = loss(vector, at=15) - plain
        # by plain hooks: the teacher's logits under hbar at the last prompt token, each head at its own layer
        place = prompt_end(batch)
        hooks = []
        for o in vector.operations:

            def before(module, args, o=o):
                z = args[0].reshape(*args[0].shape[:2], o.site.n, o.site.tap.width).clone()
                for unit, value in zip(o.ids.tolist(), o.value):
                    z[:, :, unit][place] += value
                return (z.reshape(args[0].shape),)

            hooks.append(model.get_submodule(o.site.tap.module).register_forward_pre_hook(before))
        with torch.no_grad():
            teacher = model(input_ids=batch["input_ids"]).logits
            [h.remove() for h in hooks]
            student = model(input_ids=batch["input_ids"]).logits
        p, q = (x[:, :-1] / 2 for x in (student, teacher))
        literal = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum() / len(batch["input_ids"])
        assert apart == pytest.approx(float(literal), rel=1e-3)
        assert apart > 0.05


def instructing(seed):
    """Accuracy without the instruction: as it is, with the heads' means, with theta, with a random theta; by task."""
    model, told = base(seed), {name: {} for name in ("plain", "heads", "theta", "random")}
    for task in KNOWN:
        out, test = found_for(model, task), rows(task, batch=256, seed=6, bare=True)
        ((name, theta),) = out["theta"].items()
        drawn = torch.randn(theta.shape, generator=generator(seed, "random", task))
        drawn *= theta.norm() / drawn.norm()
        random = ng.intervene(model, out["stream"], "add", value={name: drawn}).graft()
        for kind, graft in (("plain", None), ("heads", out["vector"]), ("theta", out["inserted"]), ("random", random)):
            told[kind][task] = accuracy(model, test, graft)
    return told


def averaged(told):
    return {kind: sum(by.values()) / len(by) for kind, by in told.items()}


def test_a_vector_from_ten_heads_stands_in_for_the_instruction():
    model = base(0)
    out, test = found_for(model, "reverse"), rows("reverse", batch=128, seed=6, bare=True)
    assert len(out["heads"]) == 10
    assert accuracy(model, rows("reverse", batch=128, seed=6)) > 0.95
    assert accuracy(model, test, out["inserted"]) > 0.7 > 0.5 > accuracy(model, test)
    # the graft as it ships, in generation from prompts alone
    prompts = test[0]["input_ids"][:, :-1]
    with out["inserted"].on(model):
        said = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=1, do_sample=False)
    assert float((said[:, -1] == test[0]["labels"][:, -1]).float().mean()) == accuracy(model, test, out["inserted"])


@effect
def test_the_vector_raises_accuracy_and_a_random_one_does_not():
    told = [instructing(seed) for seed in range(3)]
    each = [averaged(t) for t in told]
    bar("accuracy without the instruction, theta added", [t["theta"] for t in each], at_least=0.7)
    bar("the same, the heads' means each at its own layer", [t["heads"] for t in each], at_least=0.7)
    bar("the same, a random theta of the same norm", [t["random"] for t in each], at_most=0.5)
    note(without_the_instruction=json.dumps(told))


def splits(model, graft):
    """By task: what is lost of instruction and knowledge, and what the heads' means or theta, put back, recover."""
    found = {}
    for task in KNOWN:
        (plain,) = rows(task, batch=128, seed=7, bare=True)
        with torch.no_grad():  # the plain completion is what the base says by itself
            plain["labels"][:, -1] = model(input_ids=plain["input_ids"]).logits[:, -2].argmax(-1)
        out, pos = found_for(model, task), rows(task, batch=128, seed=7)
        found[task] = instruction_split(model, graft, pos, [plain], vector=out["vector"])
        found[task]["by_theta"] = instruction_split(model, graft, pos, [plain], vector=out["inserted"])["recovered"]
    return found


def test_the_audits_say_nothing_of_no_change_and_the_whole_of_a_planted_one():
    model = base(0)
    pos, neg = rows("copy", seed=5), rows("copy", seed=5, bare=True)
    same = instruction_split(model, Graft(), pos, neg)
    assert same["instruction"]["lost"] == same["knowledge"]["lost"] == 0.0
    assert same["share"] is None
    drift = vector_drift(model, Graft(), pos, neg, measure="nll")
    assert drift["cosine"] == pytest.approx(1.0)
    assert (drift["overlap"]["shared"], len(drift["heads"]["after"])) == (10, 10)
    # A change that gives the word "copy" the numbers of the word that was never trained loses the instruction alone.
    with attach(model) as live:
        words = live.named_parameters()["model.embed_tokens.weight"]
        words.data[TASK] = words.data[NONE]
        live.write()
        graft = live.graft()
    out = found_for(model, "copy")
    split = instruction_split(model, graft, pos, neg, vector=out["vector"])
    assert split["knowledge"]["lost"] == 0.0
    assert split["share"] == 1.0
    assert split["instruction"]["after"] == pytest.approx(float(answer_scores(model, neg).mean()), abs=1e-6)
    assert split["reinserted"] > split["instruction"]["after"] + 0.2
    assert split["recovered"] > 0.4
    drift = vector_drift(model, graft, pos, neg, measure="nll")
    assert drift["cosine"] < 0.99
    with pytest.raises(RequestError, match="no set of additions"):
        instruction_split(model, graft, pos, neg, vector=graft)


CELLS = {
    (sign, weight): f"sign {sign:+d}, KL {'on' if weight else 'off'}" for weight in (1.0, 0.0) for sign in (-1, 0, 1)
}


def table(seed):
    """Fine-tune on the fifth task in all six ways: accuracy there, and what is left of the other four."""
    model = base(seed)
    vector = found_for(model, LEARNED)["vector"]
    data, test = rows(LEARNED, count=40, batch=32, seed=100 + seed), rows(LEARNED, batch=256, seed=6)
    found, grafts = {}, {}
    for (sign, weight), name in CELLS.items():
        objective = ("guided", {"vector": vector, "sign": sign, "weight": weight})
        with attach(model, None, adapter=("lora", {"r": 8})) as live:
            fit(live, data, steps=100, lr=1e-2, objective=objective, seed=seed)
            graft = live.graft()
        with graft.on(model.eval()):
            kept = {task: accuracy(model, rows(task, batch=128, seed=6)) for task in KNOWN}
            found[name] = {"learned": accuracy(model, test), "kept": sum(kept.values()) / len(kept)}
        if (sign, weight) in ((0, 0.0), (-1, 1.0)):
            grafts[name] = graft
    return found, grafts


@effect
def test_guidance_keeps_more_of_the_other_tasks_at_equal_accuracy_on_the_new_one():
    told, better, equal, again, cosine, share = [], [], [], [], {}, []
    plain, published = CELLS[0, 0.0], CELLS[-1, 1.0]
    for seed in range(3):
        found, grafts = table(seed)
        told.append(found)
        better.append(found[published]["kept"] - found[plain]["kept"])
        equal.append(found[published]["learned"] - found[plain]["learned"])
        lost = list(splits(base(seed), grafts[plain]).values())
        again.append([[s["recovered"], s["by_theta"]] for s in lost])
        share.append([s["share"] for s in lost])
        for name, graft in grafts.items():
            sides = [rows("copy", seed=5), rows("copy", seed=5, bare=True)]
            drift = vector_drift(base(seed), graft, *sides, measure="nll")
            cosine.setdefault(name, []).append([drift["cosine"], drift["overlap"]["shared"]])
    bar("other tasks' accuracy, guided (sign -1) above plain", better, at_least=0.1)
    bar("the new task's accuracy, guided above plain", equal, at_least=-0.02)
    note(table=json.dumps(told), recovered_by_heads_and_theta=json.dumps(again), instruction_share=json.dumps(share))
    note(vector_cosine_and_shared_heads=json.dumps(cosine))
    # The paper's claim that new patterns lie over old ones, which come back with their vector; "part" is our reading.
    part = [sum(t for _, t in seed if t is not None) / max(1, sum(t is not None for _, t in seed)) for seed in again]
    bar("share of an instruction's loss that its theta brings back after plain tuning", part, at_least=0.1, missed=True)


def test_the_recipe_finds_the_vector_and_tunes_with_it():
    model, before = base(0), snapshot(base(0))
    (pos,), (neg,) = rows("copy", batch=24, seed=3), rows("copy", batch=24, seed=3, bare=True)
    one, other = (
        [{"input_ids": t.tolist(), "labels": y.tolist()} for t, y in zip(side["input_ids"], side["labels"])]
        for side in (pos, neg)
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "instructed.jsonl"
        file.write_text("\n".join(json.dumps({"positive": p, "negative": n}) for p, n in zip(one, other)))
        changes = {"instructed": str(file), "at": "attention", "measure": "nll", "lr": 1e-2, "epochs": 1, "batch": 8}
        out = run("instruction_vector", model, one, changes=changes)
    assert not moved(before, model)
    assert len(out.state["heads"]) == 10
    assert {o.kind for g in ("vector", "inserted") for o in out.state[g].operations} == {"add"}
    card = out.graft.card
    assert card["objective"]["options"]["vector"] == out.state["vector"].identity
    assert (card["objective"]["options"]["sign"], card["steps"]) == (-1, 3)
    with out.graft.on(model):
        names = {name.rpartition("self_attn.")[2] for name in moved(before, model)}
    assert names == {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
    assert accuracy(model, rows("copy", batch=128, seed=6, bare=True), out.state["inserted"]) > 0.7


def test_what_cannot_be_is_refused():
    model, (batch,) = base(0), rows("copy", batch=4)
    with pytest.raises(RequestError, match="prompts without the instruction"):
        causal_effect(Context(model, sites(model, "head"), [batch]))
    site = next(iter(sites(model, "channel").values()))
    with pytest.raises(RequestError, match="enter a linear map"):
        written(model, site, torch.tensor([0]), torch.ones(1))
    scores = causal_effect(Context(model, sites(model, "head"), [batch], [batch]))
    with pytest.raises(RequestError, match="count=25 of 24"):
        instructed({"scores": scores, "model": model, "data": [batch]}, count=25)
    with pytest.raises(RequestError, match="place of the vector"):
        instructed({"scores": scores, "model": model, "data": [batch]}, at="ffn")
    step = Step(model, batch)
    for options, words in (({"sign": 2}, "sign=2"), ({"reduce": "max"}, "reduction"), ({}, "reference")):
        with pytest.raises(RequestError, match=words):
            choose("objectives", "guided", **options)(step)
    with pytest.raises(RequestError, match="str"):
        guided(step, vector="folder")
    with pytest.raises(RequestError, match="predict the token ahead"):
        guided(Step(pico("t5"), batch))
    vector = found_for(model, "copy")["vector"]
    with pytest.raises(RequestError, match="unknown length"):
        guided(step, vector=vector)
    early = Step(model, batch, 0, 4)
    assert early.predictions is not None
    with pytest.raises(RunError, match="never fired"):  # what has been computed already cannot be intervened in
        guided(early, vector=vector)
    model.activation_checkpointing_enable()
    try:
        with pytest.raises(RequestError, match="checkpointing"):
            guided(Step(model.train(), batch, 0, 4), vector=vector)
    finally:
        model.activation_checkpointing_disable()
        model.eval()
