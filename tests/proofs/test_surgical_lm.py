"""Surgical fine-tuning: the Fisher information is the mean of squared gradients of log p, and ranks the layers."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.resolve import resolve
from neurograft.core.units import Part, Site
from neurograft.pipeline.attach import attach
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico
from neurograft.worlds.tiny import accuracy
from tests.proofs import bar, effect, note, patched
from tests.proofs._relations import pair_rows, reader
from tests.proofs._spoilt import whole_batches_are_squared
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "surgical-lm", "identity"


@contextmanager
def the_raw_logit_is_differentiated():
    """The label's logit takes the place of its log-probability, as in the reference."""
    context = resolve("neurograft.core.context.Context")

    def logit(self, batch):
        found = self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return -found.gather(-1, batch["labels"][:, None]).mean()

    with patched(context, "scalar", logit):
        yield


@contextmanager
def the_best_layers_are_frozen():
    """The layers with the most information are frozen."""
    bottom = resolve("neurograft.selectors.bottom")
    with patched("neurograft.selectors.bottom", "bottom", resolve("neurograft.selectors.top")):
        yield
    assert resolve("neurograft.selectors.bottom") is bottom


BROKEN = (whole_batches_are_squared, the_raw_logit_is_differentiated, the_best_layers_are_frozen)


class Gated(nn.Module):
    """Two layers, each multiplied by a gate, and a classifier."""

    def __init__(self, gates=(1.0, 0.0)):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in gates)
            self.head = nn.Linear(5, 3)
        self.gates = gates
        self.double()

    def forward(self, features, labels=None):
        x = features
        for layer, gate in zip(self.layers, self.gates):
            x = x + gate * layer(x).tanh()
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        from types import SimpleNamespace

        return SimpleNamespace(logits=logits, loss=loss)


def layers_of(net):
    found = {}
    for i in range(len(net.gates)):
        names = [f"layers.{i}.weight", f"layers.{i}.bias"]
        parts = tuple(Part.whole(n, net.get_parameter(n).numel()) for n in names)
        found[f"{i}/layer"] = Site(f"{i}/layer", "layer", 1, parts, layer=i)
    return found


def scored(net, batches, **options):
    context = Context(net, layers_of(net), batches, loss=lambda m, b: m(**b).loss)
    found = resolve("neurograft.locators.fisher")(context, **options)
    return [float(v) for v in found.values.values()]


def data(count=2, batch=6):
    rng = torch.Generator().manual_seed(1)
    return [
        {
            "features": torch.randn(batch, 5, generator=rng, dtype=torch.float64),
            "labels": torch.randint(3, (batch,), generator=rng),
        }
        for _ in range(count)
    ]


def test_logistic_regression_by_hand():
    """With p = 3/4 and labels 1, 1, 1, 0, F = p (1 - p) x^2 = 3/16 x^2."""

    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([torch.tensor(3.0).log() / 2, 0.0], dtype=torch.float64))

        def forward(self, features, labels=None):
            from types import SimpleNamespace

            logits = torch.stack([torch.zeros(len(features), dtype=torch.float64), features @ self.weight], 1)
            return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))

    site = Site("w", "weight", 2, (Part("weight", ((1, 2), (2, 1))),))
    batch = {"features": torch.tensor([[2.0, 5.0]] * 4, dtype=torch.float64), "labels": torch.tensor([1, 1, 1, 0])}
    context = Context(Logistic(), {"w": site}, [batch], loss=lambda m, b: m(**b).loss)
    found = resolve("neurograft.locators.fisher")(context).values["w"]
    torch.testing.assert_close(found, torch.tensor([3 / 16 * 4, 3 / 16 * 25]), rtol=1e-6, atol=0)


def test_examples_one_by_one_equal_vmapped_gradients():
    net, batches = Gated((1.0, 0.5)), data()
    parameters = {n: p.detach() for n, p in net.named_parameters()}

    def minus_log_p(values, features, label):
        return F.cross_entropy(functional_call(net, values, (features[None],)).logits, label[None])

    total = dict.fromkeys(parameters, 0.0)
    for batch in batches:
        each = vmap(grad(minus_log_p), in_dims=(None, 0, 0))(parameters, batch["features"], batch["labels"])
        for name, g in each.items():
            total[name] = total[name] + g.square().sum(0) / 12
    for aggregate, read in {"sum": lambda f: f.sum(), "fro": lambda f: f.norm()}.items():
        expected = [sum(float(read(total[f"layers.{i}.{leaf}"])) for leaf in ("weight", "bias")) for i in range(2)]
        torch.testing.assert_close(
            torch.tensor(scored(net, batches, aggregate=aggregate)), torch.tensor(expected), rtol=1e-5, atol=0
        )
    sizes = scored(net, batches, aggregate="mean")
    whole = scored(net, batches, aggregate="sum")
    torch.testing.assert_close(torch.tensor(sizes) * 30, torch.tensor(whole), rtol=1e-5, atol=0)


def test_a_layer_behind_a_closed_gate_scores_nothing_and_ranks_last():
    for gates in ((1.0, 0.0), (0.0, 1.0)):
        found = scored(Gated(gates), data(), aggregate="fro")
        assert [v == 0.0 for v in found] == [g == 0.0 for g in gates]


def test_the_recipe_freezes_the_lowest_layers_and_nothing_else():
    model = pico("bert", num_hidden_layers=4)
    before = snapshot(model)
    changes = {"epochs": 1, "lr": 1e-3, "warmup": 0.0, "accumulate": 1, "batch": 8}
    out = run("surgical_lm", model, pair_rows(), changes=changes)
    assert not moved(before, model)
    literal = torch.zeros(4)
    rows = pair_rows()
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        logits = model(**{k: v[None] for k, v in row.items() if k != "labels"}).logits
        F.cross_entropy(logits, row["labels"][None]).backward()
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad.square() / len(rows)
    for name, f in squares.items():
        if ".layer." in name:
            literal[int(name.split(".layer.")[1].split(".")[0])] += f.norm()
    frozen = set(literal.argsort()[:2].tolist())
    out.graft.apply(model)
    changed = moved(before, model)
    still = {n for n in before if any(f".layer.{i}." in n for i in frozen)}
    assert not still & set(changed)
    free = {n for n in before if n not in still}
    assert free - set(changed) <= {n for n in free if "embedding" in n or ".key.bias" in n}
    assert any("embeddings" in n for n in changed)
    assert any("pooler" in n for n in changed)
    assert any("classifier" in n for n in changed)


def spearman(a, b):
    ra, rb = (torch.tensor(x).argsort().argsort().double() for x in (a, b))
    return float(torch.corrcoef(torch.stack([ra, rb]))[0, 1])


@effect
def test_either_half_of_the_layers_learns():
    """A tiny BERT with 6 layers, 3 seeds: Spearman before and after tuning; half of the layers tuned, either half.

    The paper's effects do not show at this size, which is why the scale says "identity": the ranking is less stable
    than 0.7, and the best half is no better than the other. That either half learns is asserted.
    """
    table = {"spearman": [], "top_half": [], "bottom_half": []}
    for seed in range(3):
        model, train, test = reader(seed, layers=6)
        found = sites(model, "layer")

        def ranking(net, found=found, train=train):
            context = Context(net, found, train[:3], loss=lambda m, b: m(**b).loss)
            inner = ("fisher", {"aggregate": "fro", "limit": 96})
            return resolve("neurograft.locators.rehearsed")(context, by=inner, steps=30)

        scores = ranking(model)
        for name, protect in (("top_half", scores.bottom(fraction=0.5)), ("bottom_half", scores.top(fraction=0.5))):
            with attach(model, None, adapter="dense", protect=protect) as live:
                fit(live, train, steps=120, lr=1e-3, warmup=10, decay="linear")
                table[name].append(accuracy(model.eval(), test))
        with attach(model) as live:
            fit(live, train, steps=120, lr=1e-3, warmup=10, decay="linear")
            graft = live.graft()
        with graft.on(model):
            after = ranking(model)
        table["spearman"].append(spearman(*([float(v) for v in s.values.values()] for s in (scores, after))))
    note(**table)
    gains = [top - bottom for top, bottom in zip(table["top_half"], table["bottom_half"])]
    bar("Spearman of layer scores before and after tuning", table["spearman"], at_least=0.7, missed=True)
    bar("accuracy of the top half less that of the bottom half", gains, at_least=0.0, missed=True)
    assert min(table["top_half"] + table["bottom_half"]) > 0.45  # chance is a third
