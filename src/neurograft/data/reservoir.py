"""A small buffer in which every example seen so far lies with the same probability."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

from neurograft.core.card import method
from neurograft.core.context import IGNORE, Batch, Phase
from neurograft.core.errors import RequestError
from neurograft.core.prompts.examples import singles
from neurograft.core.seeds import generator

T = TypeVar("T")


@method(paper="fpf")
def reservoir(stream: Iterable[T], *, size: int, seed: int = 0) -> list[T]:
    """Return a uniform sample of a stream whose length nobody knows, read once (Vitter's algorithm R).

    Args:
        stream: examples in their order.
        size: of the buffer; shorter streams are kept whole.
        seed: names the draws.

    Raises:
        RequestError: a buffer of no size.

    Example:
        >>> len(reservoir(range(100), size=5)), reservoir(range(3), size=5)
        (5, [0, 1, 2])
    """
    buffer: Reservoir[T] = Reservoir(size, seed=seed)
    for example in stream:
        buffer.see(example)
    return buffer.items


class Reservoir(Generic[T]):
    """The buffer while the stream goes on.

    Args:
        size: how many examples it holds.
        seed: names the draws.

    Raises:
        RequestError: a buffer of no size.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if size < 1:
            raise RequestError(f"a buffer of {size} examples", expected="at least 1", do="give it a size")
        self.size, self.items, self.seen = size, list[T](), 0
        self.keeping, self.drawing = generator(seed, "reservoir"), generator(seed, "reservoir", "draw")

    def see(self, example: T) -> None:
        """Take an example in with probability size / seen, in the place of a random one."""
        self.seen += 1
        if len(self.items) < self.size:
            self.items.append(example)
            return
        place = int(torch.randint(self.seen, (), generator=self.keeping))
        if place < self.size:
            self.items[place] = example

    def draw(self, count: int) -> list[T]:
        """Return random examples of the buffer, without repetition as far as it goes.

        Raises:
            RequestError: nothing was seen yet.
        """
        if not self.items:
            raise RequestError("a draw from an empty buffer", expected="examples", do="let it see some before")
        order = torch.randperm(len(self.items), generator=self.drawing)[:count]
        return [self.items[int(i)] for i in order]


class Replay:
    """Data for a loop that turns from a stream to a buffer and back: a callable (draw, phase) -> batch.

    In the stage called `stage` batches come from the buffer; otherwise the next one of the stream does, and its
    examples are shown to the buffer.

    Args:
        stream: batches in their order; every one is used once.
        size: of the buffer, in examples.
        batch: examples drawn from it at a time.
        stage: beginning of the names of stages that learn from the buffer.
        remember: batch -> logits, kept with every example as its column `remembered`, for the objective of that name.
        seed: names the draws.
    """

    def __init__(
        self,
        stream: Iterable[Batch],
        *,
        size: int,
        batch: int = 16,
        stage: str = "repair",
        remember: Callable[[Batch], torch.Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.stream: Iterator[Batch] = iter(stream)
        self.buffer: Reservoir[Batch] = Reservoir(size, seed=seed)
        self.batch, self.stage, self.remember = batch, stage, remember

    def __call__(self, draw: int, phase: Phase) -> Batch:
        """Return the batch of a draw.

        Raises:
            RequestError: the stream has ended, or the buffer holds rows of several lengths and no mask.
        """
        if phase.stage.startswith(self.stage):
            return _joined(self.buffer.draw(self.batch))
        found = next(self.stream, None)
        if found is None:
            raise RequestError(
                f"draw {draw} from a stream that has ended", expected="a batch for every step outside of repairs",
                do="make fewer steps, or give more data",
            )  # fmt: skip
        shown = found
        if self.remember is not None:
            with torch.no_grad():
                shown = {**found, "remembered": self.remember(found).detach()}
        for example in singles(shown):
            self.buffer.see(example)
        return found


def _joined(examples: list[Batch]) -> Batch:
    """Return examples as one batch; shorter rows are filled up on the right, labels with -100, anything else with 0."""
    found: dict[str, Any] = {}
    for name, first in examples[0].items():
        rows = [example[name] for example in examples]
        if not isinstance(first, torch.Tensor) or not first.dim():
            found[name] = first
        elif len({row.shape for row in rows}) == 1:
            found[name] = torch.cat(rows)
        elif name in ("input_ids", "inputs_embeds") and "attention_mask" not in examples[0]:
            raise RequestError(
                f"{name} of several lengths without an attention_mask in a buffer",
                expected="a mask that tells tokens from what they are filled up with",
                do="give batches with an attention_mask, or of one length",
            )
        else:
            fill = IGNORE if name == "labels" else 0
            found[name] = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], True, fill)
    return found
