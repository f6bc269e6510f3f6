"""LoKI: attributions add up, votes ignore a loud example, only the voted rows move, and spare rows forget least."""

import copy
import json
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from neurograft.anatomy.roles import with_roles
from neurograft.anatomy.sites import sites
from neurograft.audits.average_forgetting import average_forgetting
from neurograft.core.context import Context, Step
from neurograft.core.errors import RequestError
from neurograft.core.grafts.delta import LowRank
from neurograft.core.grafts.graft import Graft
from neurograft.core.resolve import resolve
from neurograft.core.selection import Scores, Selection
from neurograft.locators.kva import kva
from neurograft.pipeline.attach import attach
from neurograft.pipeline.diff import diff
from neurograft.pipeline.plan import plan
from neurograft.pipeline.run import run
from neurograft.selectors.vote import vote
from neurograft.train.loop import fit
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import fit as plain_fit
from neurograft.worlds.tiny import llama
from tests.proofs import bar, effect, note, patched
from tests.proofs._spoilt import without_the_activation
from tests.proofs._tools import moved, rows_in, snapshot, tuned_to

PAPER, SCALE = "loki", "identity"
DOWN = "model.layers.{}.mlp.down_proj/row"


@contextmanager
def the_needed_rows_are_overwritten():
    """The highest attributions are voted for instead of the lowest."""
    plain = resolve("neurograft.selectors.vote.joined")
    with patched("neurograft.selectors.vote", "joined", lambda scores: -plain(scores)):
        yield


@contextmanager
def the_path_forgets_the_activation():
    """Gradients along the path are not multiplied with what the row writes."""
    with without_the_activation("neurograft.locators.kva"):
        yield


@contextmanager
def the_mean_decides():
    """There is one ballot, the mean over the examples."""
    with patched("neurograft.selectors.vote", "_kept", lambda scores: [Scores(scores.sites, scores.values)]):
        yield


BROKEN = (the_needed_rows_are_overwritten, the_path_forgets_the_activation, the_mean_decides)


def rows_of(model):
    return with_roles(model, sites(model, "row"), ["down"])


def some(model, *ids):
    return Selection.of(rows_of(model), {DOWN.format(i): chosen for i, chosen in enumerate(ids)})


def test_attribution_is_its_literal_twin():
    """The paper's sum for each row: z_j / m times the gradients of the answer's probability at k / m of z."""
    model = pico("llama")
    batch = pico_batch(model, batch=3)
    batch["labels"][:, :5] = -100
    found = kva(Context(model, rows_of(model), [batch]), per_example=True)
    for i, layer in enumerate(model.model.layers):
        for row in range(3):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            literal = torch.zeros(32)
            for k in range(1, 8):
                held = {}

                def moved_to(module, args, out, k=k, held=held):
                    held["z"] = out[0, 4].detach()
                    held["x"] = (k / 7 * held["z"]).requires_grad_(True)
                    return torch.cat([out[:, :4], held["x"][None, None], out[:, 5:]], 1)

                hook = layer.mlp.down_proj.register_forward_hook(moved_to)
                p = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits[0, 4].softmax(-1)
                hook.remove()
                (g,) = torch.autograd.grad(p[one["input_ids"][0, 5]], held["x"])
                literal += held["z"] * g / 7
            torch.testing.assert_close(found.per_example[DOWN.format(i)][row], literal, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(
            found.values[DOWN.format(i)], found.per_example[DOWN.format(i)].mean(0), rtol=1e-4, atol=1e-9
        )


def test_the_released_code_begins_at_token_zero_and_takes_the_likeliest_token():
    model = pico("llama")
    batch = {"input_ids": pico_batch(model, batch=2)["input_ids"]}
    as_released = {"baseline": "token", "everywhere": True, "answer": "likeliest", "rule": "trapezoid"}
    found = kva(Context(model, rows_of(model), [batch]), per_example=True, **as_released)
    with torch.no_grad():
        out = model(**batch).logits[:, -1]
    layer, literal, said = model.model.layers[1].mlp.down_proj, torch.zeros(2, 32), out.argmax(-1)
    seen = []
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    for tokens in (batch["input_ids"], torch.zeros_like(batch["input_ids"])):
        model(**{**batch, "input_ids": tokens})
    hook.remove()
    z, b = seen
    for k in range(7):
        x = (b + k / 6 * (z - b)).requires_grad_(True)
        hook = layer.register_forward_hook(lambda module, args, out, x=x: x)
        p = model(**batch).logits[:, -1].softmax(-1).gather(1, said[:, None]).sum()
        hook.remove()
        (g,) = torch.autograd.grad(p, x)
        literal += (0.5 if k in (0, 6) else 1.0) / 6 * ((z - b) * g)[:, -1]
    torch.testing.assert_close(found.per_example[DOWN.format(1)], literal, rtol=1e-3, atol=1e-8)
    with pytest.raises(RequestError, match="labelled answer"):
        kva(Context(model, rows_of(model), [batch]))


def test_attributions_of_a_layer_add_up():
    model = pico("llama")
    given = Context(model, rows_of(model), [pico_batch(model, batch=4)])
    for of in ("probability", "logit"):
        assert kva(given, of=of, steps=50, rule="midpoint").card["completeness_error"] < 0.02


def test_one_loud_example_does_not_change_the_vote():
    a = DOWN.format(0)
    site = {a: rows_of(pico("llama"))[a]}
    calm = torch.arange(32.0).expand(9, 32) + torch.rand(9, 32, generator=torch.Generator().manual_seed(0))
    loud = torch.cat([calm, 1e6 * torch.arange(31.0, -1.0, -1.0)[None]])
    quiet = vote(Scores(site, {a: calm.mean(0)}, {}, {a: calm}), count=4, lowest=True)
    voted = vote(Scores(site, {a: loud.mean(0)}, {}, {a: loud}), count=4, lowest=True)
    assert quiet.ids[a].tolist() == voted.ids[a].tolist() == [0, 1, 2, 3]
    assert Scores(site, {a: loud.mean(0)}).bottom(count=4).ids[a].tolist() == [28, 29, 30, 31]
    signs = torch.tensor([[-9.0, -0.1, 0.2, 3.0] * 8])
    both = Scores(site, {a: signs[0]}, {}, {a: signs})
    assert vote(both, count=8, lowest=True).ids[a].tolist() == list(range(0, 32, 4))
    assert vote(both, count=8, lowest=True, absolute=True).ids[a].tolist() == list(range(1, 32, 4))
    with tempfile.TemporaryDirectory() as scratch:
        both.save(Path(scratch) / "scores.safetensors")
        assert torch.equal(Scores.load(Path(scratch) / "scores.safetensors").per_example[a], signs)
    with pytest.raises(RequestError, match="per_example=True"):
        vote(Scores(site, {a: signs[0]}), count=2)


class Split(nn.Module):
    """The paper's layer: active rows above frozen ones, and a permutation back."""

    def __init__(self, linear, ids):
        super().__init__()
        rest = [i for i in range(linear.out_features) if i not in ids]
        self.order = torch.tensor([*ids, *rest]).argsort()
        self.active, self.frozen = (nn.Linear(linear.in_features, len(i)) for i in (ids, rest))
        for part, chosen in ((self.active, ids), (self.frozen, rest)):
            part.weight.data, part.bias.data = linear.weight.data[chosen].clone(), linear.bias.data[chosen].clone()

    def forward(self, x):
        return torch.cat([self.active(x), self.frozen(x)], -1)[..., self.order]


def test_rows_train_as_the_split_layer_and_nothing_else_moves():
    model = pico("llama", mlp_bias=True)
    twin, before, ids = copy.deepcopy(model), snapshot(model), ([3, 17, 4], [31])
    batches, near = [pico_batch(model, seed=s) for s in range(4)], {"rtol": 0, "atol": 1e-5}
    twin.requires_grad_(False)
    for layer, chosen in zip(twin.model.layers, ids):
        layer.mlp.down_proj = Split(layer.mlp.down_proj, chosen)
        layer.mlp.down_proj.frozen.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    with torch.no_grad():
        plain = model(**batches[0]).logits
    with attach(model, some(model, *ids)) as live:
        with torch.no_grad():
            assert torch.equal(model(**batches[0]).logits, plain)
        assert live.graft().empty or not moved(before, model)
        ours = torch.optim.Adam(live.parameters(), lr=1e-2)
        for batch in batches:
            for net, steps in ((model, ours), (twin, optimizer)):
                steps.zero_grad()
                net(**batch).loss.backward()
                steps.step()
        changed = moved(before, model)
        assert changed.keys() == {
            f"model.layers.{i}.mlp.down_proj.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")
        }
        for i, chosen in enumerate(ids):
            assert changed[f"model.layers.{i}.mlp.down_proj.bias"].tolist() == sorted(chosen)
            assert {e // 48 for e in changed[f"model.layers.{i}.mlp.down_proj.weight"].tolist()} == set(chosen)
            down, split = model.model.layers[i].mlp.down_proj, twin.model.layers[i].mlp.down_proj
            weight, bias = down.weight.detach().tolist(), down.bias.detach().tolist()
            torch.testing.assert_close(torch.tensor([weight[j] for j in chosen]), split.active.weight.detach(), **near)
            torch.testing.assert_close(torch.tensor([bias[j] for j in chosen]), split.active.bias.detach(), **near)
        with torch.no_grad():
            last = model(**batches[0]).logits
        graft = live.graft()
    assert not moved(before, model)
    with graft.on(model), torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, last)


def test_a_lora_inside_the_rows_is_a_product_there_and_nothing_elsewhere():
    model = pico("llama", mlp_bias=True)
    batch, before, ids = pico_batch(model), snapshot(model), [3, 4, 17, 20, 21]
    weight, bias = (f"model.layers.0.mlp.down_proj.{leaf}" for leaf in ("weight", "bias"))
    model(**batch).loss.backward()
    dense = model.get_parameter(weight).grad[ids].clone()
    model.zero_grad()
    with attach(model, some(model, ids), adapter=("slice_lora", {"rank": 2, "alpha": 6.0})) as live:
        theta = live.named_parameters()[weight]
        assert theta.shape == (5 + 48, 2)
        b = theta[5:].detach().clone().t()
        model(**batch).loss.backward()
        torch.testing.assert_close(theta.grad[:5], 3 * dense @ b.t(), rtol=1e-4, atol=1e-7)
        assert not theta.grad[5:].any()  # A is 0
        fit(live, [batch], steps=4, lr=1e-2)
        rows = {e // 48 for e in moved(before, model)[weight].tolist()}
        assert rows == set(ids)
        assert moved(before, model)[bias].tolist() == ids
        change = model.get_parameter(weight).detach() - before[weight]
        with torch.no_grad():
            last = model.eval()(**batch).logits
        graft = live.graft()
    assert not moved(before, model)
    assert int(torch.linalg.matrix_rank(change.double(), tol=1e-5)) == 2
    delta = graft.deltas[weight]
    assert isinstance(delta, LowRank)
    torch.testing.assert_close(delta.product(), change, rtol=1e-3, atol=1e-6)
    with graft.on(model), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, last, rtol=1e-5, atol=1e-5)
    with pytest.raises(RequestError, match="a selection"):
        attach(model, None, adapter="slice_lora")


def test_the_recipe_votes_and_trains_the_rows_with_most_votes():
    model = pico("llama")
    batch, before = pico_batch(model, batch=8), snapshot(model)
    batch["labels"][:, :4] = -100
    rows = rows_in(batch)
    assert plan(model, "loki", changes={"q": 12.5})["trainable"] == 2 * 4 * 48
    assert plan(model, "loki", changes={"q": 12.5, "rank": 2})["trainable"] == 2 * (4 + 48) * 2
    for rank in (None, 2):
        brisk = {"q": 12.5, "lr": 1e-2, "epochs": 1.0, "warmup": 0.0, "rank": rank}
        out = run("loki", model, rows, changes=brisk)
        assert not moved(before, model)
        for i in (0, 1):
            each, count = out.scores.per_example[DOWN.format(i)], torch.zeros(32)
            for scores in each:
                count[scores.argsort()[:4]] += 1
            chosen = out.where.ids[DOWN.format(i)]
            assert len(chosen) == 4
            assert float(count[chosen].min()) >= float(count[~torch.isin(torch.arange(32), chosen)].max())
        with out.graft.on(model):
            changed = moved(before, model)
        assert {n: {e // 48 for e in v.tolist()} for n, v in changed.items()} == {
            n.replace("/row", ".weight"): set(v.tolist()) for n, v in out.where.ids.items()
        }


def test_average_forgetting_is_the_papers_mean_of_shares():
    """From 4 to 3 is a quarter lost, from 2 to 3 half as much again won: (25 - 50) / 2 percent."""
    model = pico("llama")
    batch, norm = pico_batch(model), "model.norm.weight"
    with torch.no_grad():
        tuned = copy.deepcopy(model)
        tuned.get_parameter(norm)[0] += 1.0
    graft = diff(model, tuned)

    def read(net, batch):
        moved = float(net.get_parameter(norm)[0]) - float(model_norm)
        rise = moved if int(batch["input_ids"][0, 0]) == 1 else -moved
        return torch.full((len(batch["input_ids"]),), 2.0 + rise if int(batch["input_ids"][0, 0]) == 1 else 4.0 + rise)

    model_norm = model.get_parameter(norm)[0].clone()
    up, down = ({**batch, "input_ids": torch.full_like(batch["input_ids"], i)} for i in (1, 2))
    found = average_forgetting(model, graft, groups={"up": [up], "down": [down]}, by="read", metrics={"read": read})
    assert found["benchmarks"]["up"] == {"before": 2.0, "after": 3.0, "degradation": -50.0}
    assert found["benchmarks"]["down"] == {"before": 4.0, "after": 3.0, "degradation": 25.0}
    assert found["average"] == -12.5
    assert average_forgetting(model, Graft(), [up], by="read", metrics={"read": read})["average"] == 0.0
    with pytest.raises(RequestError, match="scores 0"):
        average_forgetting(model, graft, [up], by="none", metrics={"none": lambda net, batch: torch.zeros(2)})


ADD, COUNT, SHARE = ("add", "first"), "count", 0.25


@cache
def base(seed):
    """A tiny decoder that adds and sorts letters into thirds, which takes its FFNs; shared, to be left as found."""
    model = llama(seed, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=4)
    return plain_fit(model, mixture(ADD, count=450, batch=32, length=3, seed=seed), lr=4e-3)


@cache
def located(seed):
    data = mixture(ADD, count=8, batch=32, length=3, seed=70 + seed)
    return kva(Context(base(seed), rows_of(base(seed)), data), per_example=True)


@effect
def test_attributions_of_a_trained_layer_add_up():
    fine, published = [], []
    for seed in range(3):
        given = Context(base(seed), rows_of(base(seed)), mixture(ADD, count=1, batch=32, length=3, seed=70 + seed))
        fine.append(kva(given, steps=50, rule="midpoint").card["completeness_error"])
        published.append(kva(given).card["completeness_error"])
    bar("completeness error of the worst layer, 50 midpoints, relative", fine, at_most=0.02)
    note(completeness_error_of_7_right_steps=published)


def harm(model, where):
    """Return the rise of the known tasks' loss when the rows are 0."""
    held = mixture(ADD, count=1, batch=128, length=3, seed=91)
    before = snapshot(model)
    with torch.no_grad():
        plain = float(Step(model, held[0]).log_probs.mean().neg())
        for name, ids in where.ids.items():
            model.get_parameter(where.sites[name].parts[0].param)[ids] = 0.0
        found = float(Step(model, held[0]).log_probs.mean().neg()) - plain
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return found


@effect
def test_zeroing_needed_rows_hurts_more_than_zeroing_spare_ones():
    """A quarter of the rows of both layers, voted by 256 examples, 3 seeds."""
    for absolute, words in ((False, "signed as published"), (True, "absolute")):
        ratios, record = [], []
        for seed in range(3):
            scores = located(seed)
            top, bottom = (
                harm(base(seed), vote(scores, fraction=SHARE, per="layer", lowest=low, absolute=absolute))
                for low in (False, True)
            )
            record.append([top, bottom])
            ratios.append(top / bottom)
        note(**{f"harm of top and bottom rows, {words}": json.dumps(record)})
        what = f"harm of zeroing the top rows over that of the bottom rows, {words}"
        bar(what, ratios, at_least=2.0, missed=not absolute)


@effect
def test_implanting_in_spare_rows_forgets_less():
    """It learns to count in a quarter of the rows of `down_proj` until the loss is 0.75; KL from the base on the old
    tasks, against as many random rows (3 draws) and a LoRA with as many numbers on the same matrices, 3 seeds."""
    record = {name: [] for name in ("spare", "absolute", "random", "lora")}
    for seed in range(3):
        model, scores = base(seed), located(seed)
        spare = vote(scores, fraction=SHARE, per="layer", lowest=True)
        every = Selection.of(spare.sites, {name: range(site.n) for name, site in spare.sites.items()})
        how = {"lr": 1e-2, "target": 0.75, "task": COUNT, "seed": seed, "known_tasks": ADD}
        assert spare.numel == 2 * 12 * 96 == 2 * 8 * (48 + 96)
        record["spare"].append(tuned_to(model, spare, **how)["kl"])
        absolute = vote(scores, fraction=SHARE, per="layer", lowest=True, absolute=True)
        record["absolute"].append(tuned_to(model, absolute, **how)["kl"])
        drawn = [tuned_to(model, spare.random_like(10 * seed + i), **how)["kl"] for i in range(3)]
        record["random"].append(sum(drawn) / 3)
        record["lora"].append(tuned_to(model, every, adapter=("lora", {"r": 8}), **how)["kl"])
    note(forgotten=json.dumps(record))
    for words, arm in (("signed as published", "spare"), ("absolute", "absolute")):
        for other, what in (("random", "in as many random rows"), ("lora", "by a LoRA of as many numbers")):
            more = [a - b for a, b in zip(record[other], record[arm])]
            bar(f"KL forgotten {what} above spare rows, {words}", more, at_least=0.0, missed=other == "random")
