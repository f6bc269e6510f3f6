"""Critical layers: CKA by its properties, the planted change point, components removed, layers swapped back."""

from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from neurograft.anatomy.sites import sites
from neurograft.core.context import Context
from neurograft.core.errors import RequestError
from neurograft.core.numerics.linalg import linear_cka, mean_cca, principal
from neurograft.core.resolve import resolve
from neurograft.core.selection import Selection
from neurograft.core.taps.tap import watch
from neurograft.core.units import Site, Tap
from neurograft.pipeline.attach import attach
from neurograft.pipeline.locate import locate
from neurograft.pipeline.put_back import put_back
from neurograft.pipeline.run import run
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import llama
from tests.proofs import bar, note, patched
from tests.proofs._tools import moved, rows_in, snapshot

PAPER, SCALE = "spectral-layers", "tiny"


@contextmanager
def every_token_counts():
    """Not the last one of the prompt."""
    with patched(
        "neurograft.locators.change_point", "ends", lambda batch, **more: torch.ones(batch_shape(batch)).bool()
    ):
        yield


@contextmanager
def the_largest_delta_is_critical():
    """High similarity marks the layer."""
    locate = resolve("neurograft.locators.change_point")
    scores = resolve("neurograft.core.selection.Scores")

    @wraps(locate)
    def upside_down(context, **options):
        found = locate(context, **options)
        return scores(found.sites, {n: -v for n, v in found.values.items()}, found.card)

    with patched("neurograft.locators.change_point", "change_point", upside_down):
        yield


@contextmanager
def other_directions_are_removed():
    """The components are shifted by one feature."""
    made = resolve("neurograft.edits.remove_components.principal")

    def shifted(x, count):
        directions, sizes = made(x, count)
        return directions.roll(1, 1), sizes

    with patched("neurograft.edits.remove_components", "principal", shifted):
        yield


BROKEN = (every_token_counts, the_largest_delta_is_critical, other_directions_are_removed)


def batch_shape(batch):
    return tuple(batch["inputs_embeds" if "inputs_embeds" in batch else "input_ids"].shape[:2])


class Blocks(nn.Module):
    """12 residual blocks with small updates, one of them with a large one."""

    def __init__(self, seed, large, wide=24, count=12):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList()
        for i in range(count):
            block = nn.Linear(wide, wide)
            with torch.no_grad():
                block.weight.copy_(torch.randn(wide, wide, generator=rng) / wide**0.5)
                block.bias.zero_()
            self.blocks.append(Residual(block, 2.5 if i == large else 0.15))

    def forward(self, inputs_embeds):
        for block in self.blocks:
            inputs_embeds = block(inputs_embeds)
        return SimpleNamespace(logits=inputs_embeds)


class Residual(nn.Module):
    """x + scale tanh(W x)."""

    def __init__(self, linear, scale):
        super().__init__()
        self.linear, self.scale = linear, scale

    def forward(self, x):
        return x + self.scale * self.linear(x).tanh()


def layers_of(net, wide=24):
    return {
        f"{i}": Site(f"{i}", "layer", 1, (), Tap(f"blocks.{i}", width=wide, stride=wide), layer=i)
        for i in range(len(net.blocks))
    }


def test_cka_by_its_properties():
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64)).Q
    assert linear_cka(x, x) == 1.0
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1.0, abs=1e-12)
    cx, cy = x - x.mean(0), y - y.mean(0)
    by_features = float((cx.t() @ cy).norm() ** 2 / ((cx.t() @ cx).norm() * (cy.t() @ cy).norm()))
    k, m = cx @ cx.t(), cy @ cy.t()
    by_gram = float((k * m).sum() / (k.norm() * m.norm()))
    assert by_features == pytest.approx(by_gram, abs=1e-12)
    assert linear_cka(x, y) == pytest.approx(by_features, abs=1e-12)
    few = linear_cka(x[:5], y[:5])  # fewer rows than features: the other form
    cx, cy = x[:5] - x[:5].mean(0), y[:5] - y[:5].mean(0)
    assert few == pytest.approx(float((cx.t() @ cy).norm() ** 2 / ((cx.t() @ cx).norm() * (cy.t() @ cy).norm())))


def test_correlation_by_hand():
    """The same plane in other coordinates correlates fully, an orthogonal one not at all, one shared axis by half."""
    x = torch.eye(6, dtype=torch.float64)[:, :4]
    x = torch.linalg.qr(x - x.mean(0)).Q
    assert mean_cca(x[:, :2], x[:, :2] @ torch.tensor([[2.0, 1], [1, 1]], dtype=torch.float64)) == pytest.approx(1.0)
    assert mean_cca(x[:, :2], x[:, 2:]) == pytest.approx(0.0, abs=1e-12)
    assert mean_cca(x[:, :2], x[:, 1:3]) == pytest.approx(0.5)


def test_the_score_is_that_of_the_literal_windows():
    """The last prompt token of rows with and without an answer; windows of 5 and 3, clipped at the ends."""
    model = pico("llama", num_hidden_layers=5)
    batches = [pico_batch(model, batch=4, seed=s) for s in range(3)]
    for i, batch in enumerate(batches):
        labels = batch["labels"].clone()
        labels[:, : 2 + i] = -100
        batch["labels"] = labels
    found = sites(model, "layer", at="residual")
    context = Context(model, found, batches)
    hidden = [[] for _ in range(5)]
    for i, batch in enumerate(batches):
        with torch.no_grad():
            states = model.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
            ).hidden_states
        for layer in range(4):
            hidden[layer].append(states[layer + 1][:, 1 + i])
    rows = [torch.cat(h) for h in hidden[:4]]  # the last state transformers gives has passed the final norm
    for window in (5, 3):
        scores = resolve("neurograft.locators.change_point")(context, window=window, components=(1, 2))
        cka = torch.tensor(scores.card["cka"])
        for i in range(4):
            for j in range(4):
                assert float(cka[i, j]) == pytest.approx(linear_cka(rows[i], rows[j]), abs=1e-5)
        side = window // 2
        for i, (name, value) in enumerate(scores.values.items()):
            near = [float(cka[j, i]) for j in range(5) if abs(i - j) <= side]
            assert float(value) == pytest.approx(1 - sum(near) / len(near), abs=1e-6), name
            assert scores.card["delta"][i] == pytest.approx(sum(near) / len(near), abs=1e-6)
        assert all(0 <= c <= 1 for k in (1, 2) for c in scores.card["cca"][k])
    for bad in ({"window": 4}, {"window": 1}):
        with pytest.raises(RequestError, match="odd window"):
            resolve("neurograft.locators.change_point")(context, **bad)
    with pytest.raises(RequestError, match="give texts"):  # images have no last token of a prompt
        locate(pico("vit"), [pico_batch("vit")], by="change_point", units="layer", at="residual")


def test_the_planted_change_point_is_found():
    """12 blocks, a large update at block 6: the lowest delta inside the stack is at 5 or 6, 3 seeds."""
    table = {"hit": [], "there": [], "away": []}
    for seed in range(3):
        net = Blocks(seed, large=6)
        rng = torch.Generator().manual_seed(100 + seed)
        batches = [{"inputs_embeds": torch.randn(50, 3, 24, generator=rng)} for _ in range(4)]
        scores = resolve("neurograft.locators.change_point")(Context(net, layers_of(net), batches))
        delta = scores.card["delta"]
        lowest = min(range(1, 11), key=lambda i: delta[i])
        table["hit"].append(float(lowest in (5, 6)))
        table["there"].append(delta[lowest])
        table["away"].append(max(delta[1:4]))
        assert [n for n, ids in scores.top(count=1).ids.items() if len(ids)] == [str(lowest)]
        around = resolve("neurograft.locators.change_point")(Context(net, layers_of(net), batches), around=True)
        window = resolve("neurograft.selectors.threshold")(around, above=0.75 - 2)
        chosen = {int(n) for n, ids in window.ids.items() if len(ids)}
        assert chosen == set(range(lowest - 2, lowest + 3))
    note(delta_there=table["there"], delta_away=table["away"])
    bar("share of seeds whose lowest delta is at block 5 or 6", table["hit"], at_least=1.0)


def test_removed_components_leave_no_variance():
    """At the last token of layer 1; other tokens and layers below pass as before; the file holds the directions."""
    model = pico("llama", num_hidden_layers=3)
    found = sites(model, "layer", at="residual")
    names = list(found)
    batches = [{k: v for k, v in pico_batch(model, batch=8, seed=s).items() if k != "labels"} for s in range(3)]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    context = Context(model, found, batches)
    where = Selection.of(found, {names[1]: [0]})
    graft = resolve("neurograft.edits.remove_components")(context, where, numbers=(0, 2))

    def read():
        kept = {n: [] for n in names}
        with watch(model, found, lambda n, x: kept[n].append(x.reshape(len(x), -1).double())), torch.no_grad():
            for batch in batches:
                model(**batch)
        return {n: torch.cat(v).reshape(24, 8, -1) for n, v in kept.items()}

    before = read()
    directions, sizes = principal(before[names[1]][:, -1], 3)
    assert sizes[0] > sizes[1] > sizes[2] > 0
    with graft.on(model):
        after = read()
    assert torch.equal(after[names[0]], before[names[0]])
    assert torch.equal(after[names[1]][:, :-1], before[names[1]][:, :-1])
    along = (after[names[1]][:, -1] @ directions.t()).var(0)
    kept = (before[names[1]][:, -1] @ directions.t()).var(0)
    assert float(along[0]) < 1e-10 < float(kept[0])
    assert float(along[2]) < 1e-10 < float(kept[2])
    assert float(along[1]) == pytest.approx(float(kept[1]), rel=1e-4)
    again = read()
    assert all(torch.equal(again[n], before[n]) for n in names)
    with pytest.raises(RequestError, match="as a weight change"):
        graft.operations[0].fold(model)
    with pytest.raises(RequestError, match="component 99"):
        resolve("neurograft.edits.remove_components")(context, where, numbers=(99,))


def test_swapping_the_planted_layer_back_recovers_the_base_loss():
    """Layer 2 moved much and all others a little: only its return brings the loss back."""
    model = llama(hidden_size=32, intermediate_size=48)
    batch = pico_batch(model, batch=4)
    rng = torch.Generator().manual_seed(5)
    with attach(model) as live:
        for name, parameter in live.trained().items():
            size = 0.5 if ".layers.2." in name else 1e-5
            parameter.data.add_(size * torch.randn(parameter.shape, generator=rng))
        graft = live.graft()
    layers = sites(model, "layer")
    names = list(layers)

    def loss():
        with torch.no_grad():
            return float(model(**batch).loss)

    base = loss()
    with graft.on(model):
        tuned = loss()
    left = []
    for i in range(4):
        with put_back(model, graft, Selection.of(layers, {names[i]: [0]})).on(model):
            left.append(abs(loss() - base))
    assert left[2] < 1e-3 < 0.1 < abs(tuned - base)
    assert min(x for i, x in enumerate(left) if i != 2) > 0.1


def test_the_recipe_trains_or_freezes_the_window():
    model = pico("llama", num_hidden_layers=7)
    rows = rows_in(pico_batch(model, batch=8))
    before = snapshot(model)
    for use in ("train", "freeze"):
        changes = {"use": use, "window": 3, "lr": 1e-2, "batch": 4, "warmup": 0.0}
        out = run("spectral_layers", model, rows, changes=changes)
        assert not moved(before, model)
        delta = out.scores.card["delta"]
        point = min(range(7), key=lambda i: delta[i])
        window = {i for i in range(7) if abs(i - point) <= 1}
        with out.graft.on(model):
            changed = set(moved(before, model))
        layers = {int(n.split(".")[2]) for n in changed if ".layers." in n}
        assert layers == (window if use == "train" else set(range(7)) - window)
        assert any("embed" in n for n in changed) == (use == "freeze")
