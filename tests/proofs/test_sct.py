"""SCT: the channels that are strong class by class get a small dense map behind each attention."""

import tempfile
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from neurograft.adapters.channels import channels
from neurograft.core.channel_map import ChannelMap, mapped
from neurograft.core.context import Context
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.graft import Graft
from neurograft.core.seeds import generator
from neurograft.core.taps.behind import Behind
from neurograft.core.units import Part, Site, Tap
from neurograft.locators.salient import salient
from neurograft.pipeline.attach import attach
from neurograft.pipeline.locate import locate
from neurograft.pipeline.plan import plan
from neurograft.pipeline.recipe import recipe
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import accuracy
from neurograft.worlds.tiny import fit as again
from tests.proofs import bar, effect, note, patched
from tests.proofs._digits import TRAINED, digits, order, reader
from tests.proofs._selective import chosen, rows_of
from tests.proofs._tools import moved, rows_in, snapshot

PAPER, SCALE = "sct", "tiny"


@contextmanager
def classes_are_pooled():
    """The norm is taken over all examples at once."""
    with patched("neurograft.locators.salient", "_classes", lambda labels, count: [0] * count):
        yield


@contextmanager
def what_entered_the_block_is_forgotten():
    """The map sees attention's contribution alone and not the stream."""
    enter = Behind._enter

    def forget(self, owner, args, kwargs):
        enter(self, owner, args, kwargs)
        self.entered = torch.zeros_like(self.entered)

    with patched(Behind, "_enter", forget):
        yield


@contextmanager
def the_map_writes_to_the_channels_beside():
    """What is read from S is added to the channels after S."""

    def beside(stream, ids, weight, bias):
        return mapped(stream, ids, weight, bias).roll(1, -1)

    with patched("neurograft.adapters.channels", "mapped", beside):
        yield


BROKEN = (classes_are_pooled, what_entered_the_block_is_forgotten, the_map_writes_to_the_channels_beside)


class Shown(nn.Module):
    """A network whose one site carries what it is given."""

    def __init__(self):
        super().__init__()
        self.here = nn.Identity()

    def forward(self, pixel_values, labels=None):
        return self.here(pixel_values)


def test_the_norm_is_averaged_over_classes_without_the_class_token():
    """Channel 0: 5 in class 0 and 0 in class 1, mean 2.5. Channel 1: 3 and 3, mean 3; pooled 4.24 < 5."""
    x = torch.zeros(5, 3, 2)
    x[:, 0] = 100.0
    x[0, 1:, 0] = torch.tensor([3.0, 4.0])
    x[0, 1, 1] = 3.0
    x[1:, 2, 1] = 1.5
    site = Site("here/channel", "channel", 2, (Part.entries("here", 2),), Tap("here"))
    batch = {"pixel_values": x, "labels": torch.tensor([0, 1, 1, 1, 1])}
    halves = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    with patched("neurograft.locators.salient", "entering", lambda model: {}):
        for batches in ([batch], halves):
            (value,) = salient(Context(Shown(), {site.name: site}, batches), skip=1).values.values()
            assert value.tolist() == [2.5, 3.0]
        (pooled,) = salient(Context(Shown(), {site.name: site}, [{"pixel_values": x}]), skip=1).values.values()
        torch.testing.assert_close(pooled, torch.tensor([5.0, 18.0**0.5]))
        with pytest.raises(RequestError, match="no token"):
            salient(Context(Shown(), {site.name: site}, [batch]), skip=3)
    with pytest.raises(RequestError, match="skip=-1"):
        salient(Context(Shown(), {site.name: site}, [batch]), skip=-1)


def streams(model, pixels, maps=None):
    """A ViT's forward pass by hand, the map added entry by entry; returns the streams behind attention and logits."""
    found, h = [], model.vit.embeddings(pixels)
    for i, layer in enumerate(model.vit.layers):
        x = h + layer.attention(layer.layernorm_before(h))[0]
        found.append(x)
        if maps is not None:
            ids, weight, bias = maps[i]
            new = list(x.unbind(-1))
            for a, channel in enumerate(ids):
                new[channel] = x[..., channel] + bias[a] + sum(weight[a, b] * x[..., c] for b, c in enumerate(ids))
            x = torch.stack(new, -1)
        h = x + layer.mlp(layer.layernorm_after(x))
    return found, model.classifier(model.vit.layernorm(h)[:, 0])


def test_the_recipe_takes_the_strongest_channels_of_the_stream_behind_attention():
    model = pico("vit")
    rows = rows_of(model)
    where = chosen("sct", model, rows)
    with torch.no_grad():
        found, _ = streams(model, torch.stack([r["pixel_values"] for r in rows]))
    kinds = torch.stack([r["labels"] for r in rows])
    assert len(where.ids) == 2
    for (name, ids), x in zip(where.ids.items(), found):
        norms = torch.stack([x[kinds == k, 1:].double().square().sum((0, 1)).sqrt() for k in kinds.unique()])
        assert ids.tolist() == sorted(norms.mean(0).topk(4).indices.tolist()), name


def test_at_the_start_nothing_changes_and_the_count_is_the_papers():
    model = pico("vit", num_hidden_layers=12, hidden_size=48, num_attention_heads=4)
    batch, where = pico_batch(model), chosen("sct", model, rows_of(model))
    before = model(**batch).logits
    with attach(model, where, adapter="channels") as live:
        assert torch.equal(model(**batch).logits, before)
        assert sum(p.numel() for p in live.parameters()) == 12 * (6 * 6 + 6)
    assert 12 * (96 * 96 + 96) == 111_744
    assert plan(model, "sct")["trainable"] == 12 * (6 * 6 + 6)


def test_only_the_chosen_channels_differ_behind_the_map():
    model = pico("vit")
    batch, where, seen = pico_batch(model), chosen("sct", model, rows_of(model)), []
    hook = model.vit.layers[0].layernorm_after.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    model(**batch)
    with attach(model, where, adapter="channels", start="normal") as live:
        assert all(
            0 < float(p.detach().abs().max()) <= 2 for n, p in live.named_parameters().items() if n.endswith("map")
        )
        model(**batch)
    hook.remove()
    differs = (seen[0] != seen[1]).flatten(0, -2).any(0).nonzero().reshape(-1)
    assert differs.tolist() == next(iter(where.ids.values())).tolist()


def test_the_map_and_its_gradient_equal_those_written_out():
    for checkpointing in (False, True):
        model = pico("vit", dtype=torch.float64)
        batch = {k: v.double() if v.is_floating_point() else v for k, v in pico_batch(model).items()}
        where = chosen("sct", pico("vit"), rows_of(model))
        if checkpointing:
            model.activation_checkpointing_enable()
            model.train()
        with attach(model, where, adapter="channels", start="normal") as live:
            for name, p in live.named_parameters().items():
                p.data = torch.randn(p.shape, generator=generator(0, name), dtype=torch.float64) / 4
            named = list(live.named_parameters().values())
            twins = [p.detach().clone().requires_grad_() for p in named]
            maps = [(ids.tolist(), *twins[2 * i : 2 * i + 2]) for i, ids in enumerate(where.ids.values())]
            out = model(**batch)
            out.loss.backward()
        model.eval()
        model.activation_checkpointing_disable()
        _, logits = streams(model, batch["pixel_values"], maps)
        torch.testing.assert_close(out.logits, logits, rtol=1e-10, atol=1e-12)
        nn.functional.cross_entropy(logits, batch["labels"]).backward()
        for p, twin in zip(named, twins):
            torch.testing.assert_close(p.grad, twin.grad, rtol=1e-8, atol=1e-12)


def test_the_recipe_ships_maps_alone_and_they_come_off():
    model = pico("vit")
    rows, before = rows_of(model), snapshot(model)
    batch = pico_batch(model)
    start = model(**batch).logits
    changes = {"lr": 1e-2, "epochs": 2, "batch": 4, "warmup": 0.0, "new": ["classifier"]}
    graft = run("sct", model, rows, changes=changes).graft
    assert not moved(before, model)
    assert sorted(graft.deltas) == ["classifier.bias", "classifier.weight"]
    assert [type(o) for o in graft.operations] == [ChannelMap, ChannelMap]
    with graft.on(model):
        tuned = model(**batch).logits
        assert set(moved(before, model)) == {"classifier.bias", "classifier.weight"}
        with pytest.raises(RequestError, match="over a map among"):
            Graft.made(model, {}, operations=graft.operations[:1]).apply(model)
    assert torch.equal(model(**batch).logits, start)
    assert not torch.equal(tuned, start)
    with tempfile.TemporaryDirectory() as folder:
        graft.save(folder)
        again = Graft.load(folder)
    assert again.identity == graft.identity
    with again.on(model):
        assert torch.equal(model(**batch).logits, tuned)
    maps = Graft.made(model, {}, operations=graft.operations)
    with maps.scale(0.0).on(model):
        assert torch.equal(model(**batch).logits, start)
    with pytest.raises(RequestError, match="as a weight change"):
        maps.operations[0].fold(model)
    with pytest.raises(RequestError, match="is missing"):
        maps.apply(pico("bert"))


def test_the_variant_behind_the_mlp_and_what_has_no_stream():
    model = pico("vit")
    where = chosen("sct", model, rows_of(model), place="mlp")
    assert all(n.endswith("residual") for n in where.ids)
    with attach(model, where, adapter="channels", start="normal"):
        assert not torch.equal(model(**pico_batch(model)).logits, pico("vit")(**pico_batch(model)).logits)
    with pytest.raises(RequestError, match="place 'between'"):
        recipe("sct", place="between")
    neurons = locate(model, rows_of(model), by="noise", units="neuron").top(count=3)
    with pytest.raises(RequestError, match="adapter='channels'"):
        channels(model, neurons)
    sandwiched = locate(pico("gemma2"), None, by="noise", units="channel").top(count=3)
    with pytest.raises(RequestError, match="adapter='channels'"):
        channels(pico("gemma2"), sandwiched)


def test_what_a_block_scales_before_it_adds_it_has_no_stream():
    """DINOv2's learned scales, the gates of a diffusion transformer: h + c is not what the block goes on with."""
    for family in ("dinov2", "dit"):
        model = pico(family)
        where = locate(model, None, by="noise", units="channel").top(count=3)
        with pytest.raises(RequestError, match="at='residual'"):
            channels(model, where)
        with pytest.raises(RequestError, match="none of which"):
            chosen("sct", model, rows_of(model))
    windows = pico("swin")
    with attach(windows, None, adapter="channels"), pytest.raises(RunError, match="another shape"):
        windows(**pico_batch(windows))


def test_the_self_attention_of_a_diffusion_model_gets_maps():
    """diffusers' UNet with cross-attention, at its latents: the recipe leaves out what is not a block's first part."""
    model = pico("unet")
    batch, before = pico_batch(model), snapshot(model)
    where = chosen("sct", model, rows_in(batch))
    assert where.ids
    assert all(".attn1." in name for name in where.ids)
    start = model(**batch).sample
    with attach(model, where, adapter="channels") as live:
        assert torch.equal(model(**batch).sample, start)
        optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2)
        model(**batch).sample.pow(2).mean().backward()
        optimizer.step()
        tuned, graft = model(**batch).sample, live.graft()
    assert not torch.equal(tuned, start)
    assert not moved(before, model)
    with graft.on(model):
        assert torch.equal(model(**batch).sample, tuned)


PLANTED, WIDE = 4, 10.0


def planted(seed):
    """A ViT that reads digits through four channels of its stream, ten times as strong as trained; and these four.

    Everything that writes to them is scaled after the training, which would undo it, and the rest gets used to it.
    """
    ids = torch.randperm(32, generator=generator(seed, "planted"))[:PLANTED]
    train = digits(order(seed)[:TRAINED])
    model = reader(seed, train, labels=10)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("cls_token", "position_embeddings")):
                p[..., ids] *= WIDE
            elif name.split(".")[-2] in ("projection", "o_proj", "fc2"):
                p[ids] *= WIDE
    return again(model, 2 * train, lr=1e-3), ids


@effect
def test_planted_channels_are_found_and_carry_more_than_random_ones():
    """A ViT that reads digits through four strong channels, tuned to inverted, mirrored ones; 3 seeds."""
    table = {"recall": [], "salient": [], "random": [], "before": []}
    for seed in range(3):
        rows = order(seed)
        model, ids = planted(seed)
        train = digits(rows[:TRAINED], turn=lambda x: -x.flip(-1))
        test = digits(rows[TRAINED:], turn=lambda x: -x.flip(-1))
        where = chosen("sct", model, train, fraction=PLANTED / 32)
        hits = sum(int(torch.isin(ids, found).sum()) for found in where.ids.values())
        table["recall"].append(hits / (2 * PLANTED))
        table["before"].append(accuracy(model, test))
        for name, mine in (("salient", where), ("random", where.random_like(seed))):
            with attach(model, mine, adapter="channels", new=["classifier"]) as live:
                fit(live, train, steps=96, lr=1e-2, warmup=10, decay="linear", seed=seed)
                graft = live.graft()
            with graft.on(model):
                table[name].append(accuracy(model, test))
    note(**table)
    bar("recall of the planted channels", table["recall"], at_least=1.0)
    bar("accuracy over random channels", [a - b for a, b in zip(table["salient"], table["random"])], at_least=0.0)
    assert all(a > b for a, b in zip(table["salient"], table["before"]))
