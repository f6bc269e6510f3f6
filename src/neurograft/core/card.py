"""Cards: what a method says of itself. Everything in a card is read by a law or a tool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from neurograft.core.errors import one_of
from neurograft.core.kinds import KINDS

F = TypeVar("F", bound=Callable[..., Any])

NEEDS = (
    "batches",  # ordinary data
    "labels",  # data with labels
    "contrast",  # a second set of batches, or positive and negative ones
    "groups",  # several sets of batches by name; positive and negative ones are two
    "target",  # a scalar function of the output
    "requests",  # edit requests
    "gradients",  # a differentiable model
    "taps",  # units whose activations pass somewhere
    "against",  # a second model or change
    "rehearse",  # a short training run
    "per_token",  # log-probabilities of a language model
    "scenarios",  # choices between options with attributes
)


@dataclass(frozen=True)
class Card:
    """A method's own description.

    Args:
        paper: slug of the paper it comes from, or None for common property.
        kinds: kinds of unit it works on; empty for all.
        needs: what it must be given, words of `NEEDS`.
        claims: promises that hold for it, by the names of the laws.
        departs: where it differs from the paper or its code, and why; empty if nowhere.
        task: for recipes, the transformers task they are for (`text-generation`), or None for a network of their own.
    """

    paper: str | None = None
    kinds: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    claims: frozenset[str] = frozenset()
    departs: str = ""
    task: str | None = None


def method(
    *,
    paper: str | None = None,
    kinds: Iterable[str] = (),
    needs: Iterable[str] = (),
    claims: Iterable[str] = (),
    departs: str = "",
    task: str | None = None,
) -> Callable[[F], F]:
    """Give a function its card, as the attribute `card`.

    Raises:
        RequestError: an unknown kind or need.

    Example:
        >>> @method(kinds={"neuron"})
        ... def busy(context): ...
        >>> sorted(busy.card.kinds)
        ['neuron']
    """
    for kind in kinds:
        one_of(kind, KINDS, what="unit kind")
    for need in needs:
        one_of(need, NEEDS, what="need")
    made = Card(paper, frozenset(kinds), frozenset(needs), frozenset(claims), departs, task)

    def give(function: F) -> F:
        function.card = made  # type: ignore[attr-defined]
        return function

    return give
