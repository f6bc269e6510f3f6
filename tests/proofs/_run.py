"""Finding proofs, running them plainly and under sabotage, and seeing which of the package's files they ran through."""

from __future__ import annotations

import importlib
import inspect
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from neurograft.core.errors import RequestError, RunError
from neurograft.pipeline._proofs import PACKAGE
from tests.proofs import noting

HERE = Path(__file__).parent
SCALES = ("identity", "tiny", "full")
# What counts as noticing a sabotage: a failed check, or the library refusing. A crash of any other kind does not.
NOTICED = (AssertionError, pytest.fail.Exception, RunError, RequestError)


@dataclass(frozen=True)
class Proof:
    """One proof file.

    Args:
        name: file name without `test_` and `.py`; the paper's slug with `_`.
    """

    name: str

    @property
    def slug(self) -> str:
        """The paper's slug."""
        return self.name.replace("_", "-")

    @cached_property
    def module(self) -> ModuleType:
        """The proof's module."""
        return importlib.import_module(f"tests.proofs.test_{self.name}")

    @property
    def broken(self) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """The sabotages by name."""
        return {sabotage.__name__: sabotage for sabotage in self.module.BROKEN}

    def tests(self, *, effects: bool) -> list[Callable[[], None]]:
        """Return the test functions in the order of the file, slow ones last and only if asked for."""
        found = [f for n, f in vars(self.module).items() if n.startswith("test_") and inspect.isfunction(f)]
        quick = [f for f in found if not getattr(f, "effect", False)]
        return quick + [f for f in found if effects and getattr(f, "effect", False)]

    def prepare(self) -> None:
        """Build the worlds the proof shares between its tests."""
        getattr(self.module, "prepare", lambda: None)()


def find() -> list[Proof]:
    """Return the proofs of this directory."""
    return [Proof(path.stem.removeprefix("test_")) for path in sorted(HERE.glob("test_*.py"))]


@dataclass
class Outcome:
    """What came of a plain run: the error's text if there was one, seconds, files run through, notes."""

    error: str | None
    seconds: float
    files: list[str]
    notes: dict[str, Any]


def attempt(proof: Proof, *, effects: bool = True) -> Outcome:
    """Run a proof as it is."""
    start = time.perf_counter()
    with noting() as notes, traced() as files:
        try:
            proof.prepare()
            for test in proof.tests(effects=effects):
                test()
            error = None
        except Exception:
            error = traceback.format_exc()
    return Outcome(error, time.perf_counter() - start, sorted(files), notes)


def noticed(
    proof: Proof,
    sabotage: Callable[[], AbstractContextManager[Any]],
    *,
    effects: bool = False,
    first: str | bool | None = None,
) -> str | None:
    """Run a proof under a sabotage and return the test that noticed it, or None if none did.

    Args:
        proof: whose tests are run.
        sabotage: what is spoilt.
        effects: run the slow tests too.
        first: the test to begin with, such as the one that noticed it before.

    Raises:
        Exception: the sabotage made something crash, which shows nothing.
    """
    proof.prepare()
    for test in sorted(proof.tests(effects=effects), key=lambda test: test.__name__ != first):
        with sabotage():
            try:
                test()
            except NOTICED:
                return test.__name__
    return None


@contextmanager
def traced() -> Iterator[set[str]]:
    """Collect the files of the package in which a function is called, by path inside the package.

    What runs while a module is imported is left out: it would depend on what was imported before.
    """
    files: set[str] = set()
    names: dict[str, str | None] = {}
    root = str(PACKAGE) + "/"

    def called(frame: FrameType, event: str, arg: Any) -> None:
        path = frame.f_code.co_filename
        if path in names:
            return
        name = path.removeprefix(root) if path.startswith(root) else None
        if name is not None:
            if _importing(frame):
                return
            files.add(name)
        names[path] = name

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield files
    finally:
        sys.settrace(before)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            return True
        frame = frame.f_back
    return False
