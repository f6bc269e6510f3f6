"""Block expansion: copies of layers that contribute nothing at first are trained; every old number stays."""

import copy
import tempfile
from contextlib import contextmanager, suppress

import pytest
import torch

from neurograft.adapters.expansion import LiveBlock, expansion
from neurograft.core.errors import RequestError, RunError
from neurograft.core.grafts.graft import Graft
from neurograft.core.inserted import Inserted, Running
from neurograft.core.seeds import generator
from neurograft.pipeline.attach import attach
from neurograft.pipeline.locate import locate
from neurograft.pipeline.run import run
from neurograft.train.loop import fit
from neurograft.worlds.pico import pico, pico_batch
from neurograft.worlds.tiny import accuracy
from tests.proofs import bar, effect, note, patched
from tests.proofs._digits import TRAINED, digits, order, reader
from tests.proofs._selective import rows_of
from tests.proofs._tools import moved, snapshot

PAPER, SCALE = "block-expansion", "tiny"


@contextmanager
def biases_are_copied_too():
    """Only the matrices of the residual writers are zero at the start."""
    made = LiveBlock.__init__

    def copied(self, model, behind, index, writers, banks):
        made(self, model, behind, index, writers, banks)
        for leaf, held in self.tensors.items():
            if leaf.endswith("bias"):
                held.theta.data = model.get_submodule(behind).get_parameter(leaf).detach().clone()
        self.running.silent = ()

    with patched(LiveBlock, "__init__", copied):
        yield


@contextmanager
def the_block_shares_the_layers_numbers():
    """The inserted block runs with the numbers of the layer it was copied from."""
    made = Running.__init__

    def shared(self, model, behind, index, values, *, silent=()):
        made(self, model, behind, index, dict(model.get_submodule(behind).named_parameters()))

    with patched(Running, "__init__", shared):
        yield


BROKEN = (biases_are_copied_too, the_block_shares_the_layers_numbers)
WRITERS = ("attention.o_proj.weight", "attention.o_proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")


def shaken(family="vit", **config):
    """A pico model none of whose biases is zero."""
    model = pico(family, **config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator(0, name))
    return model


def trained(model, steps=3, **options):
    """Insert, train for a few steps, and return the graft and the last live logits."""
    batch = pico_batch(model)
    with attach(model, adapter="expansion", **options) as live:
        optimizer = torch.optim.SGD(live.parameters(), lr=0.05, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        return live.graft(), model(**batch).logits.detach()


def test_inserted_blocks_are_the_identity():
    for family in ("vit", "dinov2", "llama", "mixtral"):
        model = shaken(family)
        batch = pico_batch(model)
        before = model(**batch).logits
        with attach(model, adapter="expansion", blocks=2):
            assert torch.equal(model(**batch).logits, before), family


def test_copies_stand_behind_the_last_layer_of_each_group():
    model = shaken(num_hidden_layers=12)
    for blocks, at in ((1, [11]), (2, [5, 11]), (3, [3, 7, 11]), (4, [2, 5, 8, 11])):
        with attach(model, adapter="expansion", blocks=blocks) as live:
            assert [o.behind for o in live.operations()] == [f"vit.layers.{i}" for i in at]
            for one in live.operations():
                for leaf, p in model.get_submodule(one.behind).named_parameters():
                    wanted = torch.zeros_like(p) if leaf in WRITERS else p
                    assert torch.equal(one.values[leaf], wanted), leaf
    with pytest.raises(RequestError, match="blocks=5"):
        expansion(model, blocks=5)
    layers = locate(model, None, by="noise", units="layer", layers=[0, 3])
    with attach(model, layers.top(fraction=1.0), adapter="expansion") as live:
        assert [o.behind for o in live.operations()] == ["vit.layers.0", "vit.layers.3"]
    with pytest.raises(RequestError, match="units of kind 'layer'"):
        expansion(model, locate(model, None, by="noise", units="row").top(count=1))


def test_at_the_first_step_only_the_zero_matrices_have_a_gradient():
    model = shaken()
    with attach(model, adapter="expansion") as live:
        model(**pico_batch(model)).loss.backward()
        for name, p in live.named_parameters().items():
            writes = name.removeprefix("vit.layers.1.").removesuffix(".inserted") in WRITERS
            assert bool(p.grad.any()) is writes, name


def test_it_trains_as_a_longer_model_does():
    """The literal twin: a ViT of three layers, the last of which is the zeroed copy."""
    model = shaken()
    batch = pico_batch(model)
    twin = pico("vit", num_hidden_layers=3)
    state = model.state_dict()
    for leaf, p in model.vit.layers[1].state_dict().items():
        state[f"vit.layers.2.{leaf}"] = torch.zeros_like(p) if leaf in WRITERS else p
    twin.load_state_dict(state)
    optimizer = torch.optim.SGD(twin.vit.layers[2].parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        twin.zero_grad()
        twin(**batch).loss.backward()
        optimizer.step()
    graft, logits = trained(model)
    torch.testing.assert_close(logits, twin(**batch).logits, rtol=1e-5, atol=1e-6)
    for leaf, value in graft.operations[0].values.items():
        torch.testing.assert_close(value, twin.vit.layers[2].get_parameter(leaf).detach(), rtol=1e-5, atol=1e-6)


def test_old_numbers_stay_and_the_blocks_come_off():
    model = shaken()
    rows, batch, before = rows_of(model), pico_batch(model), snapshot(model)
    start = model(**batch).logits
    changes = {"epochs": 3, "batch": 4, "warmup": 0.0, "new": ["classifier"]}
    graft = run("block_expansion", model, rows, changes=changes).graft
    assert not moved(before, model)
    assert sorted(graft.deltas) == ["classifier.bias", "classifier.weight"]
    (one,) = graft.operations
    assert isinstance(one, Inserted)
    assert not torch.equal(one.values["mlp.fc2.weight"], torch.zeros(()))
    with graft.on(model):
        tuned, twin = model(**batch).logits, copy.deepcopy(model)
        assert set(moved(before, model)) == {"classifier.bias", "classifier.weight"}
        with pytest.raises(RequestError, match="inserted behind"):
            Graft.made(model, {}, operations=(one,)).apply(model)
    assert not torch.equal(tuned, start)
    assert torch.equal(model(**batch).logits, start)
    assert torch.equal(twin(**batch).logits, tuned)
    with tempfile.TemporaryDirectory() as folder:
        graft.save(folder)
        again = Graft.load(folder)
    assert again.identity == graft.identity
    with again.on(model):
        assert torch.equal(model(**batch).logits, tuned)
    with pytest.raises(RequestError, match="a strength of"):
        graft.scale(0.5)
    with pytest.raises(RequestError, match="as a weight change"):
        one.fold(model)
    with pytest.raises(RequestError, match="a model with this layer"):
        Graft.made(model, {}, operations=(one,)).apply(pico("vit", intermediate_size=32))


def test_a_decoder_generates_with_the_blocks_as_without_a_cache():
    model = shaken("llama")
    graft, _ = trained(model, blocks=2)
    tokens = torch.arange(8, 14)[None]
    with graft.on(model), torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        cached, cache = [], None
        for t in range(tokens.shape[1]):
            out = model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cached, cache = [*cached, out.logits], out.past_key_values
        torch.testing.assert_close(torch.cat(cached, 1), whole, rtol=1e-4, atol=1e-5)
        how = {"max_new_tokens": 5, "do_sample": False}
        said = [model.generate(tokens, use_cache=cached, **how).tolist() for cached in (True, False)]
        assert said[0] == said[1]
        with pytest.raises(RunError, match="use_cache=False"):
            model.generate(tokens, max_new_tokens=2, cache_implementation="static")


def test_a_post_norm_model_is_refused():
    model = pico("bert")
    with attach(model, adapter="expansion"), pytest.raises(RequestError, match="pre-norm"):
        model(**pico_batch(model))


FIRST, SECOND, TARGET = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9), 0.75


def features(model, batches):
    """The class token behind the last norm, and the labels."""
    with torch.no_grad():
        found = [model.vit(pixel_values=b["pixel_values"]).last_hidden_state[:, 0] for b in batches]
    return torch.cat(found).numpy(), torch.cat([b["labels"] for b in batches]).numpy()


def neighbours(model, seed):
    """Accuracy on the first task by the five nearest neighbours in the features."""
    from sklearn.neighbors import KNeighborsClassifier

    rows = order(seed)
    fitted = KNeighborsClassifier(5).fit(*features(model, digits(rows[:TRAINED], classes=FIRST)))
    return float(fitted.score(*features(model, digits(rows[TRAINED:], classes=FIRST))))


class Reached(Exception):
    """The second task is known well enough."""


def learned(model, seed, adapter, **options):
    """Tune to the second task until its accuracy reaches the target; return that, steps, and neighbours then."""
    rows = order(seed)
    train, test = (digits(r, classes=SECOND) for r in (rows[:TRAINED], rows[TRAINED:]))
    found = {}

    def look(step):
        if step % 10:
            return
        model.eval()
        now = accuracy(model, test)
        found.update(accuracy=now, steps=step)
        if now >= TARGET:
            found.update(neighbours=neighbours(model, seed))
            raise Reached
        model.train()

    with attach(model, adapter=adapter, new=["classifier"], **options) as live, suppress(Reached):
        how = {"lr": 0.05, "optimizer": ("SGD", {"momentum": 0.9}), "warmup": 10, "seed": seed}
        fit(live, train, steps=300, evaluate=look, **how)
    model.eval()
    assert "neighbours" in found, found
    return found


@effect
def test_the_source_is_kept_better_than_by_full_tuning_at_equal_accuracy():
    """A ViT that reads digits 0 to 4 learns 5 to 9, once by one inserted block and once whole; 3 seeds."""
    table = {k: [] for k in ("before", "expanded", "full", "expanded_steps", "full_steps", "expanded_b", "full_b")}
    for seed in range(3):
        model = reader(seed, digits(order(seed)[:TRAINED], classes=FIRST), labels=5, epochs=10)
        table["before"].append(neighbours(model, seed))
        for name, adapter in (("expanded", "expansion"), ("full", "dense")):
            found = learned(model, seed, adapter)
            table[name].append(found["neighbours"])
            table[f"{name}_steps"].append(found["steps"])
            table[f"{name}_b"].append(found["accuracy"])
    note(**table)
    kept = [a - b for a, b in zip(table["expanded"], table["full"])]
    bar("neighbour accuracy kept over full tuning", kept, at_least=0.0)
