"""The CelebA layout: lists beside images, opened row by row."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from neurograft.core.errors import RequestError
from neurograft.data.celeba import celeba
from neurograft.pipeline.inputs import as_batches

ROWS = {  # image: attributes, split, identity, box
    "000001.jpg": ("-1  1", 0, 2880, "95 71 226 313"),
    "000002.jpg": (" 1  1", 0, 17, "72 94 221 306"),
    "000003.jpg": (" 1 -1", 2, 2880, "216 59 91 126"),
}


@pytest.fixture
def folder(tmp_path):
    lists = tmp_path / "Anno"
    lists.mkdir()
    (tmp_path / "img_celeba").mkdir()

    def write(name, head, column):
        rows = [f"{image} {row[column]}" for image, row in ROWS.items()]
        (lists / name).write_text("\n".join([*head, *rows]) + "\n")

    write("list_attr_celeba.txt", ["3", "Bald Smiling"], 0)
    write("list_eval_partition.txt", [], 1)
    write("identity_CelebA.txt", [], 2)
    write("list_bbox_celeba.txt", ["3", "image_id x_1 y_1 width height"], 3)
    for i, image in enumerate(ROWS):
        pixels = np.full((6 + i, 5, 3), (255, 51 * i, 0), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "img_celeba" / image, quality=100)
    return tmp_path


def test_rows_are_those_of_the_lists(folder):
    data = celeba(folder)
    assert data.attributes == ("Bald", "Smiling")
    assert len(data) == 2
    first, second = data
    assert first["labels"].tolist() == [0, 1]
    assert second["labels"].tolist() == [1, 1]
    assert [int(r["identity"]) for r in data] == [1, 0]
    assert data.identities == [17, 2880]
    assert first["box"].tolist() == [95, 71, 226, 313]
    assert first["pixel_values"].shape == (3, 6, 5)
    torch.testing.assert_close(first["pixel_values"][:, 0, 0], torch.tensor([1.0, 0, 0]), rtol=0, atol=0.02)
    assert len(celeba(folder, split="test")) == 1
    assert len(celeba(folder, split=None, limit=2)) == 2
    assert "pixel_values" not in celeba(folder, images=None)[0]
    assert len(data[1:]) == 1


def test_resized_rows_are_batches(folder):
    data = celeba(folder, split=None, size=(8, 4))
    assert "box" not in data[0]
    (batch,) = DataLoader(data, batch_size=3)
    assert batch["pixel_values"].shape == (3, 3, 8, 4)
    net = torch.nn.Linear(1, 1)
    assert as_batches(data, net)[0]["labels"].tolist() == [[0, 1], [1, 1], [1, 0]]


def test_damaged_lists_are_named(folder):
    with pytest.raises(RequestError, match="test, train, valid"):
        celeba(folder, split="tset")
    with pytest.raises(RequestError, match="no image of the split 'valid'"):
        celeba(folder, split="valid")
    with pytest.raises(RequestError, match="without a folder img"):
        celeba(folder, images="img")
    with pytest.raises(RequestError, match="without list_attr"):
        celeba(folder / "img_celeba")
    (folder / "img_celeba" / "000001.jpg").write_bytes(b"no image")
    with pytest.raises(RequestError, match=r"000001\.jpg"):
        celeba(folder)[0]
    (folder / "Anno" / "identity_CelebA.txt").write_text("000001.jpg 5\n")
    with pytest.raises(RequestError, match=r"identity_CelebA.txt without 000002"):
        celeba(folder)
    attributes = folder / "Anno" / "list_attr_celeba.txt"
    text = attributes.read_text()
    attributes.write_text(text.replace("-1", "0"))
    with pytest.raises(RequestError, match="other than 1 and -1"):
        celeba(folder)
    attributes.write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(RequestError, match="2 lines, whose head says 3"):
        celeba(folder)
    attributes.write_text(text.replace("-1  1", "-1"))
    with pytest.raises(RequestError, match="an image and 2 numbers"):
        celeba(folder)
