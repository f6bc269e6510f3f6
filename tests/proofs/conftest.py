"""Slow effects belong to `make proofs`."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked `@effect` out of ordinary runs."""
    slow = [item for item in items if getattr(getattr(item, "function", None), "effect", False)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
