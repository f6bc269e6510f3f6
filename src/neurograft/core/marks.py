"""Marks by which the rest of core knows a model that is being trained: on its weights, and among its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurograft.core.compact.live import Live

CHILD = "neurograft_values"
"""Name of the child module that holds trainable tensors, or what it begins with."""

CLAIM = "_neurograft_claim"
"""Attribute of every module that an attachment is training."""


class Watched:
    """Marks a live weight and the views of one; `neurograft` is its `Live`, `shift` (views only) what to add to the
    storage offset to get a place in the weight's storage."""

    neurograft: Live
