"""`make proofs`: run the proofs, plainly and under their sabotages, and record what they show.

Without options, those that something has changed under; `--minutes N` goes on with the stalest others until the
time is used; `--all` runs every one; slugs run just these. Exit status 1 if a proof fails or a sabotage passes.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import runpy
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import torch
import transformers

import neurograft
from neurograft.pipeline import _proofs
from tests.proofs._run import Outcome, Proof, attempt, find, noticed


def main(argv: list[str] | None = None) -> int:
    """Run what the options ask for."""
    options = argparse.ArgumentParser(prog="python -m tests.proofs", description=__doc__)
    options.add_argument("slugs", nargs="*")
    options.add_argument("--all", action="store_true", help="every proof, changed ones first")
    options.add_argument("--minutes", type=float, help="go on with the stalest until so many minutes are used")
    given = options.parse_args(argv)
    proofs = {p.slug: p for p in find()}
    unknown = sorted(set(given.slugs) - proofs.keys())
    if unknown:
        options.error(f"no proof of {', '.join(unknown)}; there are {', '.join(proofs)}")
    records = {slug: r for slug, r in _proofs.read().items() if slug in proofs}
    pending, start, failed = order(list(proofs.values()), records), time.monotonic(), []
    if given.slugs:
        pending = [proofs[slug] for slug in given.slugs]
    elif not given.all and given.minutes is None:
        pending = [p for p in pending if _proofs.standing(records.get(p.slug)) != "passing"]
    for n, proof in enumerate(pending):
        if given.minutes is not None and time.monotonic() - start > 60 * given.minutes:
            print(f"time is used; not reached: {', '.join(p.slug for p in pending[n:])}")
            break
        records[proof.slug], text = record(proof, records.get(proof.slug, {}).get("broken", {}))
        _proofs.write(records)
        standing = _proofs.standing(records[proof.slug])
        print(f"{proof.slug:24} {standing:10} {records[proof.slug]['seconds']:6.1f} s")
        if standing != "passing":
            failed.append(proof.slug)
            print(text)
    if pending:
        runpy.run_path(str(_proofs.PACKAGE.parents[1] / "docs" / "generate.py"))["main"]()  # the pages show the record
    passing = sum(_proofs.standing(r) == "passing" for r in records.values())
    print(f"{passing} of {len(proofs)} proofs stand" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def order(proofs: list[Proof], records: Mapping[str, Mapping[str, Any]]) -> list[Proof]:
    """Return proofs that do not stand first, then those recorded longest ago."""

    def key(proof: Proof) -> tuple[bool, str]:
        known = records.get(proof.slug)
        return (_proofs.standing(known) == "passing", known["date"] if known else "")

    return sorted(proofs, key=key)


def record(proof: Proof, before: Mapping[str, str | bool] | None = None) -> tuple[dict[str, Any], str]:
    """Run one proof and return its record, and what to print if it does not stand.

    Args:
        proof: which.
        before: which tests noticed the sabotages last time; they are run first.
    """
    outcome = attempt(proof)
    short = [what for what, bar in outcome.notes.get("bars", {}).items() if not bar["met"]]
    if outcome.error is None and short and proof.module.SCALE != "identity":
        outcome.error = f"not reached, so its scale is identity and not {proof.module.SCALE}: {'; '.join(short)}"
    text = outcome.error or ""
    broken: dict[str, bool | str] = {}
    for name, sabotage in proof.broken.items() if outcome.error is None else ():
        try:
            broken[name] = noticed(proof, sabotage, effects=True, first=(before or {}).get(name)) or False
        except Exception:
            broken[name] = False
            text += f"\nthe sabotage {name} crashed:\n{traceback.format_exc()}"
        if not broken[name]:
            text += f"\nthe sabotage {name} was not noticed"
    return _plain(proof, outcome, broken), text


def _plain(proof: Proof, outcome: Outcome, broken: Mapping[str, bool | str]) -> dict[str, Any]:
    method = f"recipes/{proof.name}.py"
    bars = outcome.notes.get("bars", {})
    return {
        "passed": outcome.error is None,
        "broken": dict(broken),
        "scale": proof.module.SCALE,
        "numbers": {name: value for name, value in outcome.notes.items() if name != "bars"},
        "bars": bars,
        "tests": {name: _proofs.file_digest(_proofs.TESTS / name) for name in _test_files(proof)},
        "files": _proofs.digests([*outcome.files, method]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(outcome.seconds, 1),
        "versions": {
            "neurograft": neurograft.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def _test_files(proof: Proof) -> list[str]:
    """Return the proof's file and the helpers of this directory that it imports."""
    names = {getattr(value, "__module__", "") or "" for value in vars(proof.module).values()}
    helpers = [n.removeprefix("tests.proofs.") for n in names if n.startswith("tests.proofs._")]
    return sorted({f"test_{proof.name}.py", *(f"{h}.py" for h in helpers)})


if __name__ == "__main__":
    sys.exit(main())
