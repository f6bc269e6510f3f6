"""Checkpoint coordinates: what we call a tensor is what `save_pretrained` writes, bit for bit, both ways."""

import pytest
import torch
from safetensors import safe_open

from neurograft.anatomy._recorder import Recorder
from neurograft.anatomy.checkpoint import CheckpointMap
from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import same_bits
from neurograft.core.grafts.coordinates import everything
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region, as_matrix
from neurograft.core.seeds import generator
from neurograft.core.units import Parameters
from neurograft.worlds.pico import families, pico, pico_batch


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Every family's model and the folder it was saved in, in shards."""
    made = {}

    def get(family):
        if family not in made:
            model = pico(family, seed=1)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder, max_shard_size="40KB")
            made[family] = (model, folder)
        return made[family]

    return get


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    return found


def regions_of(shape, rng):
    """A random region of every layout that fits a shape."""
    bank, rows, columns = as_matrix(shape)
    yield everything(shape, as_matrix(shape))
    numel = bank * rows * columns
    yield Region.of(shape, "flat", torch.randperm(numel, generator=rng)[: max(1, numel // 3)])
    if len(shape) > 1:
        yield Region.of(shape, "rows", torch.randperm(bank * rows, generator=rng)[: max(1, bank * rows // 3)])
        yield Region.of(shape, "cols", torch.randperm(bank * columns, generator=rng)[: max(1, bank * columns // 3)])
    if bank == 1 and rows % 2 == 0 and columns % 2 == 0 and len(shape) == 2:
        yield Region.of(shape, "block", [0, rows * columns // 4 - 1], block=(2, 2))


@pytest.mark.parametrize("family", families())
def test_names_shapes_and_bits_are_those_of_the_files(family, saved):
    model, folder = saved(family)
    where, written = CheckpointMap(model), tensors(folder)
    assert where.names() == {n: tuple(t.shape) for n, t in written.items()}
    for name, tensor in written.items():
        read = where.read(name)
        assert same_bits(read, tensor), name


@pytest.mark.parametrize("family", families())
def test_regions_go_to_the_checkpoint_and_back(family, saved):
    model, folder = saved(family)
    where, written, rng = CheckpointMap(model), tensors(folder), generator(0, family)
    for name, parameter in Parameters.of(model).by_name.items():
        if name not in where.found_in:
            continue
        numbers = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
        for region in regions_of(tuple(parameter.shape), rng):
            seen = torch.zeros(parameter.numel())
            pieces = where.to_checkpoint(name, region)
            assert sum(p.region.numel for p in pieces) == region.numel, (name, region.layout)
            for piece in pieces:
                # the file's values at the piece are the parameter's values at the region
                ours = piece.take(region.read(parameter))
                assert torch.equal(piece.region.read(written[piece.name].contiguous()), ours), (name, region.layout)
                for back in where.to_module(piece.name, piece.region):
                    marks = back.take(piece.take(region.read(numbers)))
                    assert torch.equal(back.region.read(numbers), marks), (name, region.layout, back.region.layout)
                    seen.view(-1)[back.region.flat()] += 1
            assert torch.equal(seen.nonzero().reshape(-1), region.flat().sort().values)
            assert seen.max() == 1


def test_a_neuron_of_an_expert_is_rows_of_its_own_tensors():
    where = CheckpointMap(pico("mixtral"))
    experts, inner, hidden = 4, 48, 32
    expert, neuron = 2, 7
    gate_up = "model.layers.1.mlp.experts.gate_up_proj"
    rows = [expert * 2 * inner + neuron, expert * 2 * inner + inner + neuron]
    pieces = where.to_checkpoint(gate_up, Region.of((experts, 2 * inner, hidden), "rows", rows))
    assert [(p.name.split("experts.")[1], p.region.layout, p.region.ids.tolist()) for p in pieces] == [
        ("2.w1.weight", "rows", [neuron]),
        ("2.w3.weight", "rows", [neuron]),
    ]
    down = Region.of((experts, hidden, inner), "cols", [expert * inner + neuron])
    (piece,) = where.to_checkpoint(gate_up.replace("gate_up", "down"), down)
    assert (piece.name.split("experts.")[1], piece.region.layout, piece.region.ids.tolist()) == (
        "2.w2.weight",
        "cols",
        [neuron],
    )
    (back,) = where.to_module(piece.name, piece.region)
    assert (back.region.layout, back.region.ids.tolist()) == ("cols", [expert * inner + neuron])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "mixtral"])
def test_a_graft_lands_on_the_loaded_model(family, saved, tmp_path):
    model, folder = saved(family)
    where, rng, deltas = CheckpointMap(model), generator(1, family), {}
    for name, shape in where.names().items():
        layout = "rows" if len(shape) > 1 else "flat"
        ids = torch.randperm(as_matrix(shape)[1] if len(shape) > 1 else shape[0], generator=rng)[:2]
        region = Region.of(shape, layout, ids)
        deltas[name] = Slice(region, 0.3 * torch.randn(region.values_shape, generator=rng))
    graft, batch = Graft.made(model, deltas), pico_batch(model)
    loaded = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        before = model(**batch).logits
        with graft.on(model):
            live = model(**batch).logits
        assert not torch.equal(before, live)
        graft.save(tmp_path / "graft")
        with Graft.load(tmp_path / "graft").on(loaded):
            assert torch.equal(loaded(**batch).logits, live)
        assert torch.equal(loaded(**batch).logits, before)


def test_a_graft_of_the_bare_model_fits_the_one_with_a_head_and_back(saved):
    headed, folder = saved("bert")
    bare = type(headed.bert).from_pretrained(folder, add_pooling_layer=True).eval()
    name = "encoder.layer.0.output.dense.weight"
    region = Region.of((32, 48), "rows", [3])
    graft = Graft.made(bare, {name: Slice(region, torch.ones(1, 48))})
    with graft.on(headed):
        assert torch.equal(headed.bert.encoder.layer[0].output.dense.weight[3], torch.ones(48))
    other = Graft.made(headed, {"bert." + name: Slice(region, torch.ones(1, 48))})
    with other.on(bare):
        assert torch.equal(bare.encoder.layer[0].output.dense.weight[3], torch.ones(48))


def test_an_old_name_is_understood_and_an_unknown_one_refused():
    where = CheckpointMap(pico("bert"))
    assert where.resolve("bert.embeddings.LayerNorm.gamma") == "bert.embeddings.LayerNorm.weight"
    with pytest.raises(RequestError, match=r"LayerNorm\.delta.*LayerNorm\.weight"):
        where.resolve("bert.embeddings.LayerNorm.delta")


def test_tied_weights_stand_under_the_name_that_is_saved():
    model = pico("llama", tie_word_embeddings=True)
    where = CheckpointMap(model)
    assert "lm_head.weight" not in where.names()
    assert (
        where.to_checkpoint("lm_head.weight", Region.of((64, 32), "rows", [5]))[0].name == "model.embed_tokens.weight"
    )
    assert where.resolve("lm_head.weight") == "model.embed_tokens.weight"


def test_rearrangements_that_no_family_here_has():
    """Interleaved, transposed, stacked and joined tensors, followed both ways against real index tensors."""

    def shuffle(w, v):
        halves = w.reshape(3, 2, 4).transpose(0, 1).reshape(6, 4).contiguous()
        joined = torch.cat([halves.t().contiguous(), v], 0)
        return torch.stack([joined[:3], joined[3:]], 1)[1:]

    with Recorder() as seen:
        view = seen.view(shuffle(seen.parameter("w", (6, 4)), seen.parameter("v", (2, 6))))
    real = {"w": torch.arange(24.0).view(6, 4), "v": 100 + torch.arange(12.0).view(2, 6)}
    expected = shuffle(real["w"], real["v"])
    assert torch.equal(view.real(real), expected)
    ids = torch.randperm(view.numel)[:11]
    for name, entries, held in view.down(ids):
        assert torch.equal(real[name].view(-1)[entries], expected.reshape(-1)[ids[held]])
        again, order = view.up(name, entries)
        assert torch.equal(again, ids[held][order])


def test_a_conversion_that_computes_is_refused():
    with Recorder() as seen, pytest.raises(RequestError, match="rearrange"):
        seen.parameter("w", (2, 2)) + 1
