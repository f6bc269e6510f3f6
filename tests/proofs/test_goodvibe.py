"""GoodVibe: tied deltas sum over rows and are LoRAs of rank K; a planted bit is found; opposites need clusters."""

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from neurograft.anatomy.sites import sites
from neurograft.core.compact.tied import Tied
from neurograft.core.context import Context, Step
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.delta import LowRank
from neurograft.core.grafts.graft import Graft
from neurograft.core.resolve import resolve
from neurograft.core.seeds import generator
from neurograft.core.selection import Selection
from neurograft.locators.activation import activation
from neurograft.locators.grad_x_act import grad_x_act
from neurograft.pipeline.attach import attach
from neurograft.pipeline.clustered import by_profile, kmeans
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.mixture import mixture
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.planted import ALWAYS, SAY, UNREAD, planted
from tests.proofs import bar, effect, note, patched
from tests.proofs._tools import KNOWN, LEARNED, base, moved, rows_in, snapshot

PAPER, SCALE = "goodvibe", "tiny"


@contextmanager
def only_the_first_row_of_a_group_moves():
    """The shared vector reaches one unit of each group."""

    def source(self):
        first = torch.tensor([int(g) not in self.groups[:i].tolist() for i, g in enumerate(self.groups)])
        return self.base + self.theta[self.groups] * first.reshape(-1, *[1] * (self.theta.dim() - 1))

    with patched(Tied, "source", source):
        yield


@contextmanager
def all_profiles_look_alike():
    """Clustering puts every unit of a site into one group."""
    with patched("neurograft.pipeline.clustered", "kmeans", lambda x, k, seed: torch.zeros(len(x), dtype=torch.int64)):
        yield


@contextmanager
def the_gradient_is_left_out():
    """Neurons are scored by their activation alone."""
    plain = resolve("neurograft.locators.grad_x_act.gradients")

    @contextmanager
    def blind(model, where, reader, **how):
        with plain(model, where, lambda n, x, g, rows: reader(n, x, torch.ones_like(g), rows), **how) as found:
            yield found

    with patched("neurograft.locators.grad_x_act", "gradients", blind):
        yield


BROKEN = (only_the_first_row_of_a_group_moves, all_profiles_look_alike, the_gradient_is_left_out)


def chosen(model, groups, parts=(0, 1)):
    """Return neurons of the first layer as one site a group, with their rows of gate and up."""
    (name, site), *_ = sites(model, "neuron").items()
    split = {f"{name}#{i}": site for i in range(len(groups))}
    return Selection.of(split, dict(zip(split, groups))).of_parts(*parts)


def test_groups_of_one_train_as_plain_rows_do():
    ids = [3, 7, 20]
    made = []
    for tie in (None, "site"):
        model = pico("llama")
        batches = [pico_batch(model, seed=s) for s in range(4)]
        with attach(model, chosen(model, [[i] for i in ids]), adapter=("slice", {"tie": tie})) as live:
            losses = fit(live, batches, steps=4, lr=1e-2)
            made.append((losses, {n: p.detach().clone() for n, p in model.named_parameters() if "neurograft" not in n}))
    assert made[0][0] == pytest.approx(made[1][0], abs=1e-6)
    for name, weight in made[0][1].items():
        torch.testing.assert_close(made[1][1][name], weight, rtol=0, atol=1e-6)


def test_the_gradient_of_a_vector_is_the_sum_of_its_rows():
    model = pico("llama", dtype=torch.float64)
    batch, groups = pico_batch(model), [[1, 5, 9], [2, 30]]
    model(**batch).loss.backward()
    dense = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with attach(model, chosen(model, groups), adapter=("slice", {"tie": "site"})) as live:
        model(**batch).loss.backward()
        assert len(live.named_parameters()) == 2
        for name, theta in live.named_parameters().items():
            assert theta.shape == (2, 32)
            literal = torch.stack([dense[name][g].sum(0) for g in groups])
            torch.testing.assert_close(theta.grad, literal, rtol=0, atol=1e-10)
    with attach(model, chosen(model, groups, (2,)), adapter=("slice", {"tie": "site"})) as live:
        model(**batch).loss.backward()
        ((name, theta),) = live.named_parameters().items()
        literal = torch.stack([dense[name][:, g].sum(1) for g in groups])
        torch.testing.assert_close(theta.grad, literal, rtol=0, atol=1e-10)


def test_the_graft_is_rank_k_with_a_factor_of_zeros_and_ones_and_exports_so():
    model = pico("llama")
    batch, groups, before = pico_batch(model), [[1, 5, 9], [2, 30]], snapshot(model)
    with attach(model, chosen(model, groups), adapter=("slice", {"tie": "site"})) as live:
        fit(live, [batch], steps=3, lr=1e-2)
        with torch.no_grad():
            last = model.eval()(**batch).logits
        graft = live.graft()
    assert not moved(before, model)
    for name, delta in graft.deltas.items():
        assert isinstance(delta, LowRank)
        assert delta.A.shape == (2, 32)
        assert delta.B.nonzero().tolist() == [[1, 0], [2, 1], [5, 0], [9, 0], [30, 1]]
        assert set(delta.B.unique().tolist()) == {0.0, 1.0}
        assert "gate_proj" in name or "up_proj" in name
    with tempfile.TemporaryDirectory() as scratch:
        graft.save(Path(scratch) / "graft")
        with Graft.load(Path(scratch) / "graft").on(model), torch.no_grad():
            assert torch.equal(model(**batch).logits, last)
            assert {n: len(e.div(32, rounding_mode="floor").unique()) for n, e in moved(before, model).items()} == {
                f"model.layers.0.mlp.{p}_proj.weight": 5 for p in ("gate", "up")
            }
        graft.export(Path(scratch) / "lora", to="lora", model=model)
        assert json.loads((Path(scratch) / "lora" / "adapter_config.json").read_text())["r"] == 2


def test_what_cannot_be_tied_is_said():
    model = pico("llama")
    tied = ("slice", {"tie": "site"})
    with pytest.raises(RequestError, match="in two sites"):
        attach(model, chosen(model, [[1, 2], [2, 3]]), adapter=tied)
    with pytest.raises(RequestError, match="appended rows"):
        attach(model, chosen(model, [[1]]), adapter=tied, new={"model.embed_tokens.weight": 60})
    with attach(model, chosen(model, [[1, 2], [4, 5]]), adapter=tied, protect=chosen(model, [[2]])) as live:
        assert {n: len(r.ids) for n, r in live.regions().items()} == {
            f"model.layers.0.mlp.{p}_proj.weight": 3 for p in ("gate", "up")
        }


def test_foreign_writes_are_taken_over_where_a_group_moved_alike_and_refused_elsewhere():
    model = pico("llama")
    with attach(model, chosen(model, [[1, 5], [2]], (0,)), adapter=("slice", {"tie": "site"})) as live:
        ((name, theta),) = live.named_parameters().items()
        state = {n: v.clone() for n, v in model.state_dict().items()}
        state[name][[1, 5]] += 0.25
        model.load_state_dict(state)
        torch.testing.assert_close(theta.detach(), torch.tensor([[0.25], [0.0]]).expand(2, 32), rtol=0, atol=1e-6)
        state[name][1] += 1.0
        with pytest.raises(RunError, match="tied rows cannot hold"):
            model.load_state_dict(state)


def test_a_planted_bit_is_found_by_its_gradient_and_not_by_activation():
    for seed in range(3):
        made = planted(per_layer=8, decoys=8, seed=seed, num_hidden_layers=1)
        given = Context(
            made.model, sites(made.model, "neuron"), made.batches(2), loss=lambda model, batch: model(**batch).loss
        )
        assert made.truth.ranked(grad_x_act(given)) == {"precision_at_k": 1.0, "auroc": 1.0}
        assert made.truth.ranked(activation(given))["auroc"] < 1.0


OTHER, SECOND = 9, 10  # what should be said after the second trigger, and that trigger


def opposites(seed):
    """Three neurons answer to one trigger, three to another; after the second the answer is to become another."""
    made = planted(per_layer=6, decoys=0, strength=2.0, seed=seed, num_hidden_layers=1)
    mlp = made.model.model.layers[0].mlp
    (ids,) = made.truth.selection(sites(made.model, "neuron")).ids.values()
    order = ids[torch.randperm(6, generator=generator(seed, "opposites"))]
    with torch.no_grad():
        made.model.model.embed_tokens.weight[SECOND, UNREAD] = 3.0
        made.model.lm_head.weight[OTHER] = 0.0
        made.model.lm_head.weight[OTHER, UNREAD + 1] = 2.0
        size = float(mlp.up_proj.weight[order[0], ALWAYS])
        mlp.gate_proj.weight[order[3:]] = 0.0
        mlp.gate_proj.weight[order[3:], UNREAD] = size
        assert float(mlp.down_proj.weight[SAY, order].min()) == pytest.approx(size)
    batches = []
    for batch in made.batches(8, seed=seed):
        batch["input_ids"][8:, -2], batch["input_ids"][8:, -1] = SECOND, OTHER
        batch["labels"][8:, -1] = OTHER
        batches.append(batch)
    return made, order, batches


def split(made, order, batches, k):
    """Cluster the six neurons and return the groups, and the columns of down of each."""
    where = Selection.of(sites(made.model, "neuron"), {"model.layers.0.mlp/neuron": order.sort().values})
    groups = by_profile(made.model, where, batches, k=k)
    return sorted(g.tolist() for g in groups.ids.values()), groups.of_parts(2)


def learned(made, where, batches):
    with attach(made.model, where, adapter=("slice", {"tie": "site"})) as live:
        fit(live, batches[:6], steps=30, lr=2e-1)
        made.model.eval()
        with torch.no_grad():
            return float(torch.stack([made.model(**b).loss for b in batches[6:]]).mean())


def test_opposite_groups_are_split_by_their_profiles_and_only_then_learned():
    made, order, batches = opposites(0)
    two, apart = split(made, order, batches, 2)
    assert two == sorted([sorted(order[:3].tolist()), sorted(order[3:].tolist())])
    one, together = split(made, order, batches, 1)
    assert len(one) == 1
    assert learned(made, apart, batches) < 0.2
    assert learned(made, together, batches) > 0.5


def test_kmeans_takes_no_more_groups_than_there_are_profiles():
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    found = kmeans(x, 3, 0)
    assert found[0] == found[1] != found[2]


def test_the_recipe_trains_one_vector_a_cluster():
    model = pico("llama")
    batch, before = pico_batch(model, batch=8), snapshot(model)
    rows = rows_in(batch)
    out = run("goodvibe", model, rows, changes={"fraction": 0.2, "k": 3, "lr": 1e-2, "epochs": 2.0})
    assert not moved(before, model)
    assert {n.partition("#")[0] for n in out.where.ids} == {f"model.layers.{i}.mlp/neuron" for i in (0, 1)}
    assert len(out.where) == 20  # round(0.2 * 48) in each layer
    for name, delta in out.graft.deltas.items():
        layer = name.split(".")[2]
        groups = [ids for n, ids in out.where.ids.items() if n.startswith(f"model.layers.{layer}.")]
        assert delta.A.shape[0] == len(groups) <= 3
        assert sorted(delta.B.nonzero()[:, 0].tolist()) == sorted(torch.cat(groups).tolist())


@effect
def test_opposite_groups_on_three_seeds():
    apart, together = [], []
    for seed in range(3):
        made, order, batches = opposites(seed)
        groups, where = split(made, order, batches, 2)
        assert groups == sorted([sorted(order[:3].tolist()), sorted(order[3:].tolist())])
        apart.append(learned(made, where, batches))
        together.append(learned(made, split(made, order, batches, 1)[1], batches))
    bar("loss with a vector for each of two groups", apart, at_most=0.2)
    bar("loss with one vector for both", together, at_least=0.5)


@effect
def test_located_neurons_learn_more_than_random_ones_and_forget_less_than_full_tuning():
    """A tiny decoder that copies and reverses learns to count: 8 vectors a layer, gate and up, 80 steps, 3 seeds."""
    record = {name: {"task": [], "forgot": []} for name in ("located", "random", "full")}
    for seed in range(3):
        model = base(seed)
        train = mixture((LEARNED,), count=20, batch=32, length=3, seed=50 + seed)
        test = mixture((LEARNED,), count=1, batch=128, length=3, seed=90)
        held = mixture(KNOWN, count=1, batch=128, length=3, seed=91)
        with torch.no_grad():
            known = float(Step(model, held[0]).log_probs.mean().neg())
        given = Context(model, sites(model, "neuron"), train[:4], loss=lambda m, b: m(**b).loss)
        located = grad_x_act(given).top(fraction=0.2, per="layer")
        arms = {"located": located, "random": located.random_like(seed, outside=True), "full": None}
        for name, where in arms.items():
            groups = None if where is None else by_profile(model, where, train[:4], k=8, seed=seed).of_parts(0, 1)
            adapter = "dense" if where is None else ("slice", {"tie": "site"})
            with attach(model, groups, adapter=adapter) as live:
                fit(live, train, steps=80, lr=3e-3 if where is None else 2e-2, seed=seed)
                model.eval()
                with torch.no_grad():
                    record[name]["task"].append(float(Step(model, test[0]).log_probs.mean().neg()))
                    record[name]["forgot"].append(float(Step(model, held[0]).log_probs.mean().neg()) - known)
    note(record=json.dumps(record))
    located, random, full = (record[n] for n in ("located", "random", "full"))
    gained = [a - b for a, b in zip(random["task"], located["task"])]
    kept = [a - b for a, b in zip(full["forgot"], located["forgot"])]
    bar("task loss of random neurons above located ones", gained, at_least=0.0)
    bar("old tasks' loss gained by full tuning above tied rows", kept, at_least=0.0)
