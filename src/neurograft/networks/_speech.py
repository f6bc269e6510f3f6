"""Words as numbers, a language model of descriptions, and a beam search.

Shape letters: B descriptions, L tokens, V words, b beams.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurograft.core.seeds import generator
from neurograft.core.taps.describe import words_of

START, STOP, UNKNOWN = 0, 1, 2
SPECIAL = ("<start>", "<stop>", "<unknown>")
IGNORED = -100
State = tuple[Tensor, ...]


class Vocabulary:
    """Words and their numbers, after three special tokens.

    Args:
        words: without the special ones.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*SPECIAL, *words]
        self.number = {word: i for i, word in enumerate(self.words)}

    @staticmethod
    def of(texts: Sequence[str]) -> Vocabulary:
        """Return the vocabulary of some texts, in order of the alphabet."""
        return Vocabulary(sorted({word for text in texts for word in words_of(text)}))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return texts as int64 [B, L]: start, words, stop, and -100 behind."""
        rows = [[START, *(self.number.get(w, UNKNOWN) for w in words_of(text)), STOP] for text in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the words before the first stop."""
        ended = tokens[: tokens.index(STOP)] if STOP in tokens else tokens
        return " ".join(self.words[t] for t in ended if t != START)


class Language(nn.Module):
    """p(d): an LSTM language model of descriptions.

    Args:
        size: words, with the special ones.
        embedding: width of a word's vector.
        hidden: width of each layer.
        layers: how many.
        dropout: between layers.
    """

    def __init__(
        self, size: int, *, embedding: int = 128, hidden: int = 512, layers: int = 2, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.output = nn.Linear(hidden, size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the log-probability of each next token, [B, L - 1], 0 behind the stop."""
        hidden, _ = self.lstm(self.embedding(tokens[:, :-1].clamp(min=0)))
        return chosen(self.output(hidden).log_softmax(-1), tokens[:, 1:])


def chosen(logp: Tensor, tokens: Tensor) -> Tensor:
    """Return log-probabilities [B, L, V] at tokens [B, L], 0 where there is none."""
    return logp.gather(-1, tokens.clamp(min=0)[..., None])[..., 0] * (tokens != IGNORED)


def beams(
    step: Callable[[Tensor, State], tuple[Tensor, State]], state: State, *, beam: int, length: int
) -> list[tuple[list[int], float]]:
    """Return the likeliest sequences by beam search, each with the sum of its log-probabilities, likeliest first.

    A sequence that has stopped keeps its score and its place among the beams.

    Args:
        step: (last tokens [b], state of tensors [b, ...]) -> log-probabilities [b, V] and the next state.
        state: of one beam, tensors [1, ...].
        beam: width.
        length: steps, the stop included.
    """
    tokens, scores = torch.full((1, 1), START), torch.zeros(1)
    for _ in range(length):
        logp, state = step(tokens[:, -1], state)
        ended = tokens[:, -1] == STOP
        stay = torch.full_like(logp, -torch.inf)
        stay[:, STOP] = 0.0
        logp = torch.where(ended[:, None], stay, logp)
        logp[:, START] = -torch.inf
        total = (scores[:, None] + logp).reshape(-1)
        best = total.topk(min(beam, int((total > -torch.inf).sum())))
        source, word = best.indices // logp.shape[1], best.indices % logp.shape[1]
        tokens, scores = torch.cat([tokens[source], word[:, None]], 1), best.values
        state = tuple(s[source] for s in state)
        if bool((tokens[:, -1] == STOP).all()):
            break
    return [(row[1:], score) for row, score in zip(tokens.tolist(), scores.tolist())]


def taught(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    *,
    lr: float,
    batch: int,
    epochs: int,
    patience: int,
    held: float,
    seed: int,
) -> None:
    """Train a module with AdamW until the loss on held-out examples has not improved for some epochs; keep the best.

    Args:
        module: what is trained.
        loss: numbers of examples -> scalar.
        count: how many examples there are.
        lr: step size.
        batch: examples in a step.
        epochs: at most.
        patience: epochs without improvement before it ends.
        held: share of the examples that are held out.
        seed: names split and order.
    """
    rng = generator(seed, "taught", type(module).__name__)
    order = torch.randperm(count, generator=rng)
    out = max(1, round(held * count)) if count > 1 else 0
    kept, train = order[:out], order[out:]
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    best, waited, state = float("inf"), 0, copy.deepcopy(module.state_dict())
    for _ in range(epochs):
        module.train()
        for rows in _shuffled(train, batch, rng):
            optimizer.zero_grad()
            loss(rows).backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            now = float(loss(kept if out else train))
        if now < best:
            best, waited, state = now, 0, copy.deepcopy(module.state_dict())
        else:
            waited += 1
        if waited >= patience:
            break
    module.load_state_dict(state)


def _shuffled(rows: Tensor, batch: int, rng: torch.Generator) -> Iterator[Tensor]:
    return iter(rows[torch.randperm(len(rows), generator=rng)].split(batch))


def cross_entropy(logp: Tensor, tokens: Tensor) -> Any:
    """Return the mean loss over the tokens that count, from their log-probabilities [B, L]."""
    return -logp.sum() / (tokens != IGNORED).sum()
