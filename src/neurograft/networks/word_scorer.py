"""A closed vocabulary of words, and how well each fits a set of exemplars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import digest
from neurograft.core.taps.describe import words_of
from neurograft.core.taps.shown import Shown
from neurograft.networks._regions import regions

Encode = Callable[[Tensor, Tensor], Tensor]
STOP = frozenset({"a", "an", "the", "in", "at", "on", "of", "and", "or"})


class WordScorer(nn.Module):
    """Contrasts words: p(w | E) = softmax over the vocabulary of v_w . f(E) + b_w, p(w) its share of the taught words.

    f(E) are mean and standard deviation over the exemplars of an encoder's features, brought to one scale.

    Args:
        words: the vocabulary.
        width: features of one exemplar.
        encode: (images [k, C, H, W], masks [k, H, W]) -> features [k, width].
    """

    middle: Tensor
    scale: Tensor
    share: Tensor

    def __init__(self, words: Sequence[str], width: int, *, encode: Encode = regions) -> None:
        super().__init__()
        self.words, self.encode = list(words), encode
        self.score = nn.Linear(2 * width, len(self.words))
        self.register_buffer("middle", torch.zeros(2 * width))
        self.register_buffer("scale", torch.ones(2 * width))
        self.register_buffer("share", torch.full((len(self.words),), 1 / max(1, len(self.words))))

    @property
    def identity(self) -> str:
        """What it is, for cards."""
        return f"words:{digest({**self.state_dict(), 'words': self.words})[:16]}"

    def features(self, shown: Shown) -> Tensor:
        """Return f(E), float [2 * width]."""
        each = self.encode(shown.inputs.float(), shown.masks)
        both: Tensor = torch.cat([each.mean(0), each.std(0, unbiased=False)])
        return both

    def forward(self, features: Tensor) -> Tensor:
        """Return log p(w | E) of features [..., 2 * width], float [..., words]."""
        scored: Tensor = self.score((features - self.middle) / self.scale)
        return scored.log_softmax(-1)

    def propose(self, shown: Shown, *, beam: int, length: int) -> list[tuple[str, float]]:
        """Return the likeliest words with log p(w | E)."""
        with torch.no_grad():
            best = self(self.features(shown)).sort(descending=True, stable=True)
        return [(self.words[int(i)], float(p)) for p, i in zip(best.values[:beam], best.indices[:beam])]

    def prior(self, texts: Sequence[str]) -> Tensor:
        """Return log p(w)."""
        known = {word: i for i, word in enumerate(self.words)}
        return self.share[[known[text] for text in texts]].log()


def word_scorer(
    pairs: Sequence[Mapping[str, Any]], *, encode: Encode = regions, decay: float = 1e-3, steps: int = 60
) -> WordScorer:
    """Fit a scorer of words to exemplar sets with descriptions, by cross-entropy against the words of each.

    Args:
        pairs: dicts of `images` [k, C, H, W], `masks` [k, H, W], `description`.
        encode: features of masked images; any encoder's.
        decay: L2 penalty on the word vectors.
        steps: of L-BFGS.

    Raises:
        RequestError: no pairs, or descriptions without words.

    Example:
        >>> from neurograft.worlds.scenes import scenes
        >>> found = word_scorer(scenes(count=60, k=3, size=16))
        >>> "square" in found.words
        True
    """
    bags = [[w for w in words_of(str(pair["description"])) if w not in STOP] for pair in pairs]
    counts = Counter(word for bag in bags for word in bag)
    if not counts:
        raise RequestError("no described exemplars", expected="pairs with words", do="give images, masks, description")
    words = sorted(counts)
    shown = [Shown(torch.as_tensor(p["images"]).float(), torch.as_tensor(p["masks"]).bool()) for p in pairs]
    width = encode(shown[0].inputs, shown[0].masks).shape[1]
    with torch.random.fork_rng(devices=[]):
        made = WordScorer(words, width, encode=encode)
    x = torch.stack([made.features(one) for one in shown])
    y = torch.tensor([[bag.count(w) / max(1, len(bag)) for w in words] for bag in bags])
    made.middle.copy_(x.mean(0))
    made.scale.copy_(x.std(0, correction=min(1, len(x) - 1)).clamp(min=1e-6))  # one pair has no spread
    made.share.copy_(torch.tensor([counts[w] / counts.total() for w in words]))
    nn.init.zeros_(made.score.weight)
    nn.init.zeros_(made.score.bias)
    optimizer = torch.optim.LBFGS(made.score.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = -(y * made(x)).sum(-1).mean() + decay * made.score.weight.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    return made.eval().requires_grad_(False)
