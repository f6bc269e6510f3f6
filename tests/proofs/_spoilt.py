"""Sabotages of what several papers' methods are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from neurograft.core.resolve import resolve
from tests.proofs import patched


@contextmanager
def whole_batches_are_squared() -> Iterator[None]:
    """Gradients are averaged over a batch before they are squared."""
    with patched("neurograft.locators.fisher", "singles", lambda batch: [batch]):
        yield


@contextmanager
def without_the_activation(home: str) -> Iterator[None]:
    """Gradients along the path of a locator that integrates them are not multiplied with what they are gradients of."""
    plain = resolve(f"{home}.integrated_gradients")
    with patched(home, "integrated_gradients", lambda c, **o: plain(c, **{**o, "multiply": False})):
        yield
