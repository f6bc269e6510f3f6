"""A captioner of exemplar sets: an LSTM that attends over one vector per exemplar, and a language model beside it.

Shape letters: B exemplar sets, k exemplars, d features, L tokens, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.errors import RequestError
from neurograft.core.fingerprint import digest
from neurograft.core.seeds import seeded
from neurograft.core.taps.shown import Shown
from neurograft.networks._regions import regions
from neurograft.networks._speech import Language, State, Vocabulary, beams, chosen, cross_entropy, taught

Encode = Callable[[Tensor, Tensor], Tensor]


class Captioner(nn.Module):
    """p(d | E) by an attending LSTM, p(d) by a language model.

    At each word: attention over the exemplars from tanh(Q h + K f), the attended features times a sigmoid gate of h,
    and the last word's vector go into an LSTM cell; its state began as tanh of maps of the mean features.

    Args:
        words: the vocabulary.
        width: features of one exemplar.
        encode: (images [k, C, H, W], masks [k, H, W]) -> features [k, width].
        embedding: width of a word's vector.
        hidden: width of the decoder and of the language model.
        dropout: before the decoder's output and between the language model's layers.
    """

    middle: Tensor
    scale: Tensor

    def __init__(
        self,
        words: Sequence[str],
        width: int,
        *,
        encode: Encode = regions,
        embedding: int = 128,
        hidden: int = 512,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.vocabulary, self.encode, size = Vocabulary(words), encode, len(words) + 3
        self.shape = {"width": width, "embedding": embedding, "hidden": hidden, "dropout": dropout}
        between = min(hidden, width)
        self.first_h, self.first_c = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.query, self.key, self.weigh = nn.Linear(hidden, between), nn.Linear(width, between), nn.Linear(between, 1)
        self.gate, self.cell = nn.Linear(hidden, width), nn.LSTMCell(embedding + width, hidden)
        self.embedding, self.dropout = nn.Embedding(size, embedding), nn.Dropout(dropout)
        self.output = nn.Linear(hidden, size)
        self.language = Language(size, embedding=embedding, hidden=hidden, dropout=dropout)
        self.register_buffer("middle", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @property
    def words(self) -> list[str]:
        """The vocabulary without the special tokens."""
        return self.vocabulary.words[3:]

    @property
    def identity(self) -> str:
        """What it is, for cards."""
        return f"captioner:{digest({**self.state_dict(), 'words': self.words})[:16]}"

    def features(self, shown: Shown) -> Tensor:
        """Return the exemplars' features, float [k, width], each brought to one scale."""
        with torch.no_grad():
            found: Tensor = (self.encode(shown.inputs.float(), shown.masks) - self.middle) / self.scale
        return found

    def begin(self, features: Tensor) -> State:
        """Return the decoder's first state for features [B, k, d]: h, c [B, hidden]."""
        mean = features.mean(1)
        return self.first_h(mean).tanh(), self.first_c(mean).tanh()

    def step(self, features: Tensor, tokens: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Return log-probabilities [B, V] of the next word, attention [B, k] and the next state."""
        h, c = state
        weights = self.weigh((self.query(h)[:, None] + self.key(features)).tanh())[..., 0].softmax(-1)
        seen = (weights[..., None] * features).sum(1) * self.gate(h).sigmoid()
        h, c = self.cell(torch.cat([self.embedding(tokens), seen], -1), (h, c))
        return self.output(self.dropout(h)).log_softmax(-1), weights, (h, c)

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each next token [B, L - 1], 0 behind the stop, and attention [B, L - 1, k]."""
        state, said, looked = self.begin(features), [], []
        for at in range(tokens.shape[1] - 1):
            logp, weights, state = self.step(features, tokens[:, at].clamp(min=0), state)
            said.append(logp)
            looked.append(weights)
        return chosen(torch.stack(said, 1), tokens[:, 1:]), torch.stack(looked, 1)

    @torch.no_grad()
    def propose(self, shown: Shown, *, beam: int, length: int) -> list[tuple[str, float]]:
        """Return the texts a beam search finds, with log p(d | E), likeliest first."""
        features = self.features(shown)[None]

        def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            logp, _, after = self.step(features.expand(len(tokens), -1, -1), tokens, state)
            return logp, after

        found = beams(step, self.begin(features), beam=beam, length=length)
        return [(self.vocabulary.decode(tokens), score) for tokens, score in found]

    @torch.no_grad()
    def likelihood(self, shown: Shown, texts: Sequence[str]) -> Tensor:
        """Return log p(d | E) of given texts, the stop included, float [len(texts)]."""
        features = self.features(shown)[None].expand(len(texts), -1, -1)
        return self(features, self.vocabulary.encode(texts))[0].sum(-1)

    @torch.no_grad()
    def prior(self, texts: Sequence[str]) -> Tensor:
        """Return log p(d) of texts, the stop included, float [len(texts)]."""
        found: Tensor = self.language(self.vocabulary.encode(texts)).sum(-1)
        return found


def captioner(
    pairs: Sequence[Mapping[str, Any]],
    *,
    encode: Encode = regions,
    embedding: int = 128,
    hidden: int = 512,
    dropout: float = 0.5,
    lr: float = 1e-3,
    batch: int = 64,
    epochs: int = 100,
    patience: int = 4,
    held: float = 0.1,
    even: float = 1.0,
    seed: int = 0,
) -> Captioner:
    """Train a captioner and its language model on exemplar sets with descriptions.

    The decoder's loss is cross-entropy plus `even` times the mean of (1 - attention over all words)^2.

    Args:
        pairs: dicts of `images` [k, C, H, W], `masks` [k, H, W], `description`; k the same in all.
        encode: features of masked images; any encoder's, which is not trained.
        embedding: width of a word's vector.
        hidden: width of decoder and language model.
        dropout: of both.
        lr: of AdamW.
        batch: exemplar sets in a step.
        epochs: at most.
        patience: epochs without improvement on the held-out sets.
        held: share of sets held out.
        even: weight of the attention's penalty.
        seed: names weights, split and order.

    Raises:
        RequestError: no pairs, or sets of several sizes.

    Example:
        >>> from neurograft.worlds.scenes import scenes
        >>> made = captioner(scenes(count=8, k=2, size=8), hidden=8, epochs=1)
        >>> made.shape["width"]
        26
    """
    shown = [Shown(torch.as_tensor(p["images"]).float(), torch.as_tensor(p["masks"]).bool()) for p in pairs]
    if not shown or len({len(one.inputs) for one in shown}) != 1:
        raise RequestError(
            f"{len(shown)} exemplar sets of {sorted({len(one.inputs) for one in shown})} pictures",
            expected="some, all of one size",
            do="give images, masks and description, as many pictures in each",
        )
    texts = [str(p["description"]) for p in pairs]
    with torch.no_grad():
        raw = torch.stack([encode(one.inputs, one.masks) for one in shown])
    with seeded(seed, "captioner"):
        how: dict[str, Any] = {"embedding": embedding, "hidden": hidden, "dropout": dropout}
        made = Captioner(Vocabulary.of(texts).words[3:], raw.shape[-1], encode=encode, **how)
        made.middle.copy_(raw.flatten(0, 1).mean(0))
        each = raw.flatten(0, 1)
        made.scale.copy_(each.std(0, correction=min(1, len(each) - 1)).clamp(min=1e-6))  # one picture has no spread
        features, tokens = (raw - made.middle) / made.scale, made.vocabulary.encode(texts)

        def said(rows: Tensor) -> Tensor:
            logp, weights = made(features[rows], tokens[rows])
            uneven = (1 - weights.sum(1)).square().mean()
            loss: Tensor = cross_entropy(logp, tokens[rows, 1:]) + even * uneven
            return loss

        def likely(rows: Tensor) -> Tensor:
            loss: Tensor = cross_entropy(made.language(tokens[rows]), tokens[rows, 1:])
            return loss

        options: dict[str, Any] = {"lr": lr, "epochs": epochs, "patience": patience, "held": held, "seed": seed}
        with torch.enable_grad():
            taught(made.language, likely, len(shown), batch=2 * batch, **options)
            made.language.requires_grad_(False)
            taught(made, said, len(shown), batch=batch, **options)
    return made.eval().requires_grad_(False)
