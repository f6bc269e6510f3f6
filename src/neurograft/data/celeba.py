"""CelebA as people have it on disk: attribute list, partition, identities and boxes beside a folder of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neurograft.core.card import method
from neurograft.core.errors import RequestError, one_of

SPLITS = ("train", "valid", "test")
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
BOXES, IDENTITIES = "list_bbox_celeba.txt", "identity_CelebA.txt"


@method(paper="lnet-anet")
def celeba(
    folder: str | Path,
    *,
    split: str | None = "train",
    images: str | None = "img_celeba",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
) -> Celeba:
    """Read the lists of a CelebA folder; images are opened when a row is asked for.

    The lists may lie in the folder or in folders within it (`Anno`, `Eval`). Boxes and identities are optional.

    Args:
        folder: where the lists are.
        split: "train", "valid" or "test", as the partition list says; None for all.
        images: folder of the images, within `folder`; None for rows without pixels.
        size: (height, width) to which images are resized; as they are if None, which batches only if all are alike.
        limit: at most so many rows.

    Raises:
        RequestError: a list is missing, damaged or of other images, or no row is left.

    Example:
        >>> import tempfile
        >>> lines = ["1", "Bald Smiling", "000001.jpg -1 1"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / ATTRIBUTES).write_text(chr(10).join(lines))
        ...     data = celeba(folder, split=None, images=None)
        >>> data.attributes, data[0]["labels"].tolist()
        (('Bald', 'Smiling'), [0, 1])
    """
    root = Path(folder)
    head, lines = _list(root, ATTRIBUTES, header=2)
    names = head[1].split()
    attributes = _numbers(lines, ATTRIBUTES, len(names))
    if any(v not in (-1, 1) for row in attributes.values() for v in row):
        raise RequestError(
            f"{ATTRIBUTES} with numbers other than 1 and -1", expected="the list as published", do="check the file"
        )
    chosen = list(attributes)
    if split is not None:
        part = _numbers(_list(root, PARTITION)[1], PARTITION, 1)
        wanted = SPLITS.index(one_of(split, SPLITS, what="split"))
        chosen = [name for name in chosen if _of(part, name, PARTITION)[0] == wanted]
    chosen = chosen[:limit]
    if not chosen:
        raise RequestError(f"no image of the split {split!r}", expected="at least one", do="choose another split")
    boxes = _numbers(_list(root, BOXES, header=2)[1], BOXES, 4) if _find(root, BOXES) else None
    who = _numbers(_list(root, IDENTITIES)[1], IDENTITIES, 1) if _find(root, IDENTITIES) else None
    pixels = None if images is None else root / images
    if pixels is not None and not pixels.is_dir():
        raise RequestError(
            f"{root} without a folder {images}", expected="the folder of the images", do="name it with images="
        )
    rows = []
    for name in chosen:
        row: dict[str, Any] = {"name": name, "labels": [(v + 1) // 2 for v in attributes[name]]}
        if boxes is not None:
            row["box"] = _of(boxes, name, BOXES)
        if who is not None:
            row["identity"] = _of(who, name, IDENTITIES)[0]
        rows.append(row)
    return Celeba(tuple(names), rows, pixels, size)


class Celeba(Sequence[dict[str, Any]]):
    """Rows of CelebA, for `DataLoader` or as `data` of the verbs.

    A row has `labels` (0 or 1, int64 [A]); with images `pixel_values` (float32 [3, H, W] from 0 to 1); where the
    lists are there `identity` (int64, numbered from 0 in the order of the published numbers) and, without images or
    size, `box` (x, y, width, height in pixels of the original image, int64 [4]).

    Args:
        attributes: their names.
        rows: the lists' entries.
        images: folder of the images.
        size: (height, width) of the images.
    """

    def __init__(
        self,
        attributes: tuple[str, ...],
        rows: list[dict[str, Any]],
        images: Path | None,
        size: tuple[int, int] | None,
    ) -> None:
        self.attributes, self.rows, self.images, self.size = attributes, rows, images, size
        self.identities = sorted({row["identity"] for row in rows if "identity" in row})
        self._number = {published: i for i, published in enumerate(self.identities)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Celeba(self.attributes, self.rows[index], self.images, self.size)
        row = self.rows[index]
        found: dict[str, Any] = {"labels": torch.tensor(row["labels"])}
        if self.images is not None:
            found["pixel_values"] = self._opened(self.images / row["name"])
        if "identity" in row:
            found["identity"] = torch.tensor(self._number[row["identity"]])
        if "box" in row and (self.images is None or self.size is None):
            found["box"] = torch.tensor(row["box"])
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def _opened(self, path: Path) -> torch.Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise RequestError(
                f"the image {path} ({error})", expected="a readable image", do="unpack it again"
            ) from error
        if self.size is not None:
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def _find(root: Path, name: str) -> Path | None:
    return next((p for p in (root / name, *sorted(root.glob(f"*/{name}"))) if p.is_file()), None)


def _list(root: Path, name: str, *, header: int = 0) -> tuple[list[str], list[str]]:
    """Return a list's head and its lines; the head's first line counts them."""
    path = _find(root, name)
    if path is None:
        raise RequestError(f"{root} without {name}", expected="the lists of CelebA", do="give the folder they are in")
    text = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    head, lines = text[:header], text[header:]
    if header and (not head or not head[0].strip().isdigit() or int(head[0]) != len(lines)):
        raise RequestError(
            f"{path} of {len(lines)} lines, whose head says {head[0].strip() if head else 'nothing'}",
            expected="as many as it says",
            do="copy the file again",
        )
    return head, lines


def _numbers(lines: list[str], name: str, count: int) -> dict[str, list[int]]:
    found = {}
    for line in lines:
        image, *rest = line.split()
        try:
            found[image] = [int(v) for v in rest]
        except ValueError:
            rest = []
        if len(rest) != count:
            raise RequestError(
                f"the line {line.strip()[:60]!r} of {name}",
                expected=f"an image and {count} numbers",
                do="check the file",
            )
    return found


def _of(table: dict[str, list[int]], image: str, name: str) -> list[int]:
    if image not in table:
        raise RequestError(f"{name} without {image}", expected="the same images in all lists", do="copy it again")
    return table[image]
