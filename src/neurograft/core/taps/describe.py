"""Descriptions of units: the text that tells most about where a unit is active, by weighted mutual information.

    describe(E) = argmax over d of  log p(d | E) - lam * log p(d)

What gives p(d | E) and p(d) is a `Describer`; the search proposes texts by p(d | E) alone, the weighing comes after.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neurograft.core.batches import Batch
from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import digest
from neurograft.core.taps.shown import Shown


class Describer(Protocol):
    """What proposes descriptions of exemplars and knows how common each is."""

    @property
    def identity(self) -> str:
        """What it is, for cards."""

    def propose(self, shown: Shown, *, beam: int, length: int) -> list[tuple[str, float]]:
        """Return at most `beam` texts of at most `length` words with log p(d | E), likeliest first."""

    def prior(self, texts: Sequence[str]) -> Tensor:
        """Return log p(d) of each text, float [len(texts)]."""


@dataclass(frozen=True)
class Description:
    """One text about a unit.

    Args:
        text: the words.
        score: likelihood - lam * prior.
        likelihood: log p(d | E), nats.
        prior: log p(d), nats.
    """

    text: str
    score: float
    likelihood: float
    prior: float


def describe(
    describer: Describer, shown: Shown, *, lam: float = 0.2, beam: int = 50, length: int = 15
) -> list[Description]:
    """Return descriptions of exemplars, best first: those the describer proposes, ordered by weighted information.

    Args:
        describer: gives p(d | E) and p(d).
        shown: exemplars and masks; without any, nothing is said.
        lam: weight of log p(d); 0 keeps the describer's own order.
        beam: how many texts are proposed.
        length: words of a text.

    Raises:
        RequestError: lam, beam or length out of range.
    """
    if lam < 0 or beam < 1 or length < 1:
        raise RequestError(
            f"lam={lam}, beam={beam}, length={length}", expected="lam >= 0, the others >= 1", do="leave them out"
        )
    if not len(shown.inputs):
        return []
    proposed = describer.propose(shown, beam=beam, length=length)
    priors = describer.prior([text for text, _ in proposed]).tolist()
    made = [Description(t, weighed(p, q, lam), p, q) for (t, p), q in zip(proposed, priors)]
    return sorted(made, key=lambda d: -d.score)


def weighed(likelihood: float, prior: float, lam: float) -> float:
    """Return log p(d | E) - lam * log p(d); at lam = 1 it is the pointwise mutual information.

    Example:
        >>> weighed(-1.0, -5.0, 0.2)
        0.0
    """
    return likelihood - lam * prior


def matches(text: str, query: Iterable[str]) -> bool:
    """Say whether a description contains one of some words, in any case, also inside of a longer word.

    Example:
        >>> matches("Text on a sign", ["word", "text"]), matches("a dog", ["word"])
        (True, False)
    """
    return any(word.lower() in text.lower() for word in query)


class TokenWords:
    """Describes units of text models, untrained: which tokens stand where a unit is active.

    A description is a choice of tokens, "a | b". p(d | E) is the share of a unit's active places that hold one of
    them, every exemplar counting alike, mixed with 1 % of p(d); p(d) is their share of all tokens of the data.

    Args:
        batches: the data the exemplars are from; padding does not count.
        words: token id -> text.
        most: tokens in one description.

    Raises:
        RequestError: data without tokens.

    Example:
        >>> data = [{"input_ids": torch.tensor([[5, 6, 7, 6]])}]
        >>> shown = Shown(data[0]["input_ids"], torch.tensor([[True, False, False, False]]))
        >>> describe(TokenWords(data), shown)[0].text
        '5'
    """

    OR, MIXED = " | ", 0.01

    def __init__(self, batches: Sequence[Batch], words: Callable[[int], str] = str, *, most: int = 3) -> None:
        counts: Counter[str] = Counter()
        for batch in batches:
            ids, mask = batch.get("input_ids"), batch.get("attention_mask")
            if ids is None:
                continue
            real = ids[mask.bool()] if mask is not None and mask.shape == ids.shape else ids.reshape(-1)
            for token, count in zip(*(x.tolist() for x in real.unique(return_counts=True))):
                counts[words(token)] += count
        if not counts:
            raise RequestError("data without tokens", expected="texts", do="give a describer of images")
        self.share = {word: count / counts.total() for word, count in counts.items()}
        self.words, self.most = words, most

    @property
    def identity(self) -> str:
        """What it is, for cards."""
        return f"tokens:{digest(sorted(self.share.items()))[:16]}"

    def propose(self, shown: Shown, *, beam: int, length: int) -> list[tuple[str, float]]:
        """Return the likeliest choices of one token, of two, and so on, with log p(d | E)."""
        here: Counter[str] = Counter()
        for tokens, mask in zip(shown.inputs, shown.masks):
            found = [self.words(token) for token in tokens[mask].tolist()]
            for word in found:
                here[word] += 1 / (len(found) * len(shown.inputs))  # type: ignore[assignment]
        p = {w: (1 - self.MIXED) * share + self.MIXED * self.share.get(w, 0.0) for w, share in here.items()}
        ranked = sorted(p, key=lambda w: (-p[w], w))[:beam]
        sizes = min(self.most, length, len(ranked))
        layer: list[tuple[str, ...]] = [(w,) for w in ranked]
        made = layer
        for _ in range(1, sizes):
            wider = [(*d, w) for d in layer for w in ranked[ranked.index(d[-1]) + 1 :]]
            layer = sorted(wider, key=lambda d: -sum(p[w] for w in d))[: max(1, beam // sizes)]
            made = made[: beam - len(layer)] + layer
        scored = [(self.OR.join(d), math.log(sum(p[w] for w in d))) for d in made]
        return sorted(scored, key=lambda found: -found[1])

    def prior(self, texts: Sequence[str]) -> Tensor:
        """Return log p(d), the share of all tokens that are among the text's."""
        shares = [sum(self.share.get(w, 0.0) for w in text.split(self.OR)) for text in texts]
        return torch.tensor(shares, dtype=torch.float64).clamp(min=1e-12).log()


def words_of(text: str) -> list[str]:
    """Return a description's words, lower case.

    Example:
        >>> words_of("A red square, in the corner")
        ['a', 'red', 'square', 'in', 'the', 'corner']
    """
    return re.findall(r"[\w'-]+", text.lower())
