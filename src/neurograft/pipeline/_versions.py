"""The versions that numbers were made with, for cards and reports."""

from __future__ import annotations


def versions_here() -> dict[str, str]:
    """Return the versions of this library, torch and transformers, by name.

    Example:
        >>> sorted(versions_here())
        ['neurograft', 'torch', 'transformers']
    """
    import torch
    import transformers

    import neurograft

    return {
        "neurograft": neurograft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
