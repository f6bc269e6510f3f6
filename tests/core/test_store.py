"""Graft files: what a hostile or odd one may not do, and what a card says."""

import errno
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import canonical
from neurograft.core.grafts.delta import LowRank, Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.core.untie import Untie


def tied():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    net[1].weight = net[0].weight
    return net


def made(net):
    apart = Untie.of(net, ["1.weight"]).mount(net)
    graft = Graft.made(net, {"1.weight": Slice(Region.of((4, 3), "rows", [2]), torch.ones(1, 3))}, card={"seed": 3})
    apart.remove()
    return graft


def rewrite(folder, change):
    """Change the text of a saved graft and give it the right digest again, as someone with intent would."""
    text = json.loads((folder / "graft.json").read_text())
    change(text)
    text.pop("digest")
    text["digest"] = hashlib.sha256(canonical(text)).hexdigest()
    (folder / "graft.json").write_text(json.dumps(text))


def test_the_card_says_what_it_was_made_with(tmp_path):
    card = Graft.load(made(tied()).save(tmp_path / "g")).card
    assert card["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert {"neurograft", "torch", "transformers"} <= card["versions"].keys()
    assert card["base"]["class"] == "Sequential"
    assert card["seed"] == 3


def test_a_card_with_numbers_as_keys_is_read_again(tmp_path):
    """JSON makes text of them, which sorts otherwise: the digest is of what a reader sees."""
    net = nn.Linear(3, 4)
    row = {"weight": Slice(Region.of((4, 3), "rows", [2]), torch.ones(1, 3))}
    folder = Graft.made(net, row, card={"layers": {2: 0.5, 10: 1.0}, 3: (1, 2)}).save(tmp_path / "g")
    assert Graft.load(folder).card["layers"] == {"2": 0.5, "10": 1.0}
    with pytest.raises(RequestError, match="plain data"):
        Graft.made(net, row, card={"path": tmp_path}).save(tmp_path / "h")
    assert not (tmp_path / "h").exists()


def test_changes_that_share_a_tensor_are_written_each(tmp_path):
    net, factor = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    low = {f"{i}.weight": LowRank((4, 4), factor, factor.t(), 0.5) for i in (0, 1)}
    graft = Graft.made(net, low)
    read = Graft.load(graft.save(tmp_path / "g"))
    assert read.identity == graft.identity
    rewrite(tmp_path / "g", lambda text: text["tensors"]["1.weight"].update(shape=[4, 5]))
    with pytest.raises(RequestError, match="factors"):
        Graft.load(tmp_path / "g")


@pytest.mark.parametrize("s", [float("nan"), float("inf"), "2"])
def test_a_strength_is_a_finite_number(s):
    with pytest.raises(RequestError, match="finite number"):
        Graft().scale(s)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("antigravity.Untie", "not imported"),
        ("os.system", "no operation"),
        ("neurograft.core.grafts.graft.Graft", "no operation"),
        ("neurograft.core.nothing.Untie", "cannot be imported"),
        ("pickle.loads", "no operation"),
    ],
)
def test_a_file_cannot_name_code_to_run(kind, words, tmp_path):
    folder = made(tied()).save(tmp_path / "g")
    rewrite(folder, lambda text: text["operations"][0].update(type=kind))
    with pytest.raises(RequestError, match=words):
        Graft.load(folder)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text["tensors"]["1.weight"].pop("layout"),
        lambda text: text["tensors"]["1.weight"].update(layout="cols"),
        lambda text: text["tensors"]["1.weight"].update(shape=[4, 5], matrix=[1, 4, 5]),
        lambda text: text.pop("base"),
        lambda text: text.update(format="one"),
        lambda text: text.update(tensors={"other": text["tensors"]["1.weight"]}),
        lambda text: text["tensors"]["1.weight"].update(matrix=[4, 3]),
        lambda text: text["tensors"]["1.weight"].update(shape=["4", "x"]),
        lambda text: text.pop("tensors_sha256"),
        lambda text: text["tensors"]["1.weight"].update(matrix=[1, 6, 3]),
        lambda text: text["tensors"]["1.weight"].update(matrix=[1, -4, -3]),
        lambda text: text["tensors"]["1.weight"].update(shape=[1 << 40, 3]),
        lambda text: text["tensors"]["1.weight"].update(block=[0, 1]),
        lambda text: text["tensors"]["1.weight"].update(block=[3, 3]),
        lambda text: text["tensors"]["1.weight"].update(kind="newer"),
        lambda text: text["tensors"]["1.weight"].update(kind="new"),
        lambda text: text.update(strength=float("nan")),
        lambda text: text.update(strength="1"),
        lambda text: text.update(base=["1.weight"]),
        lambda text: text.update(card=None),
    ],
)
def test_a_text_that_does_not_fit_its_tensors_is_refused(change, tmp_path):
    folder = made(tied()).save(tmp_path / "g")
    rewrite(folder, change)
    with pytest.raises(RequestError, match="truncated or changed"):
        Graft.load(folder)


def test_ids_outside_of_the_tensor_are_refused(tmp_path):
    folder = made(tied()).save(tmp_path / "g")
    rewrite(folder, lambda text: text["tensors"]["1.weight"].update(shape=[2, 3], matrix=[1, 2, 3]))
    with pytest.raises(RequestError, match="ids from 0 to 1"):
        Graft.load(folder)


def test_saving_replaces_an_older_graft_and_leaves_other_files_alone(tmp_path):
    folder, net = tmp_path / "g", tied()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    made(net).save(folder)
    second = Graft.made(net, {"0.weight": Slice(Region.of((4, 3), "rows", [0]), torch.ones(1, 3))})
    second.save(folder)
    assert Graft.load(folder).identity == second.identity
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["g", "graft.json", "graft.safetensors", "notes.txt"]
    with pytest.raises(RequestError, match="a file"):
        second.save(folder / "notes.txt")


def test_an_interrupted_save_leaves_the_older_graft(tmp_path, monkeypatch):
    folder, net = tmp_path / "g", tied()
    first = made(net)
    first.save(folder)
    monkeypatch.setattr(
        "neurograft.core.grafts.store.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        Graft.made(net, {"0.weight": Slice(Region.of((4, 3), "rows", [0]), torch.ones(1, 3))}).save(folder)
    assert Graft.load(folder).identity == first.identity
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def test_a_folder_may_be_a_link_to_another_disk(tmp_path, monkeypatch):
    """Nothing can be moved there from beside the link, nor written beside a mount."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "g").symlink_to(tmp_path / "disk", target_is_directory=True)
    replace, disk = os.replace, (tmp_path / "disk").resolve()

    def moved(source, target):
        if (disk in Path(source).resolve().parents) != (disk in Path(target).resolve().parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", moved)
    graft = made(tied())
    assert Graft.load(graft.save(tmp_path / "g")).identity == graft.identity
    assert sorted(p.name for p in disk.iterdir()) == ["graft.json", "graft.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "g"]


def test_a_save_that_fails_leaves_no_folder_it_made(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "neurograft.core.grafts.store.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        made(tied()).save(tmp_path / "g")
    assert not list(tmp_path.iterdir())


def test_tensors_of_another_kind_and_deep_text_are_refused(tmp_path):
    folder = made(tied()).save(tmp_path / "g")
    save_file({"1.weight::bits": torch.ones(2), "1.weight::value": torch.ones(1, 3)}, folder / "graft.safetensors")
    digest = hashlib.sha256((folder / "graft.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda text: text.update(tensors_sha256=digest))
    rewrite(folder, lambda text: text["tensors"]["1.weight"].update(kind="shut"))
    with pytest.raises(RequestError, match="truncated or changed"):
        Graft.load(folder)
    (folder / "graft.json").write_text("[" * 100_000)
    with pytest.raises(RequestError, match="not JSON"):
        Graft.load(folder)


def lying(header, size):
    """A safetensors file whose header says something else than what follows it."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize(
    "data",
    [
        lying({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, 4),
        lying({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, 4),
        lying({"x": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}}, 0),
        lying({"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, 8),
        lying({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4),
        ((1 << 63) - 1).to_bytes(8, "little") + b"{}",
        b"",
        b"{",
    ],
)
def test_a_header_that_lies_allocates_nothing_and_is_refused(data, tmp_path):
    folder = made(tied()).save(tmp_path / "g")
    (folder / "graft.safetensors").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite(folder, lambda text: text.update(tensors_sha256=digest))
    with pytest.raises(RequestError, match="truncated or changed"):
        Graft.load(folder)


def test_an_adapter_is_pointed_to_diff(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"ng\.diff"):
        Graft.load(tmp_path)


def test_nothing_in_the_library_reads_pickles():
    """No module uses torch.load, pickle or eval, and a pickle named like a graft's file is not unpickled."""
    words = ("torch.load(", "pickle.load", "import pickle", "weights_only=False", "joblib.load", "np.load(", "eval(")
    root = Path(__file__).parents[2] / "src" / "neurograft"
    allowed = {"np.load(": "allow_pickle=False", "eval(": ".eval("}
    for path in root.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for word in words:
                if word in line and allowed.get(word, "\0") not in line and "literal_eval(" not in line:
                    raise AssertionError(f"{path.relative_to(root)}:{number} uses {word}")


def test_a_pickle_in_the_place_of_the_tensors_is_not_opened(tmp_path):
    folder = made(tied()).save(tmp_path / "g")
    (folder / "graft.safetensors").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(RequestError, match="truncated or changed"):
        Graft.load(folder)
    digest = hashlib.sha256((folder / "graft.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda text: text.update(tensors_sha256=digest))
    with pytest.raises(RequestError, match="truncated or changed"):
        Graft.load(folder)
