"""Names of kinds: of units, and of what neurons do along a direction. Knowing them needs no torch."""

from __future__ import annotations

KINDS = (
    "weight",
    "row",
    "column",
    "block",
    "neuron",
    "head",
    "expert",
    "channel",
    "layer",
    "module",
    "norm",
    "bias",
    "token",
)

# Of neurons that moved: those that lower a projection (toward the direction or against it, active or negative, falling
# or rising), and those that raise it.
LOWERING = ("TP-", "TN-down", "AP+", "AN-up")
RAISING = ("TP+", "TN-up", "AP-", "AN-down")
