"""The report of an audit: its data, its verdict, and the two files it is kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neurograft.core.errors import RequestError
from neurograft.core.grafts.graft import Graft
from neurograft.report.page import page
from neurograft.report.rules import Rules, rules_of
from neurograft.report.verdict import verdict

FORMAT, KIND = 1, "neurograft-audit"
JSON, HTML = "report.json", "report.html"


@dataclass(frozen=True)
class Report:
    """What an audit found, as plain data; docs/audit.md describes its keys.

    Args:
        data: `format`, `kind`, `verdict`, `rules`, `gain`, `task`, `domains`, `whole`, `provenance`.
    """

    data: Mapping[str, Any]

    @staticmethod
    def of(measured: Mapping[str, Any], rules: Rules = None) -> Report:
        """Decide on measured numbers and return the report.

        Args:
            measured: `gain`, `task`, `domains`, `whole`, `provenance`.
            rules: changes to the default rules.
        """
        chosen = rules_of(rules)
        decided = verdict(measured, chosen)
        return Report({"format": FORMAT, "kind": KIND, "verdict": decided, "rules": chosen, **measured})

    @property
    def verdict(self) -> str:
        """The verdict: "ship", "do not ship" or "cannot tell"."""
        return str(self.data["verdict"]["verdict"])

    @property
    def sentence(self) -> str:
        """The verdict and its first reason, in words."""
        return str(self.data["verdict"]["sentence"])

    @property
    def exit_status(self) -> int:
        """Exit status for programs: 3 for "do not ship", else 0."""
        return int(self.data["verdict"]["exit_status"])

    def __str__(self) -> str:
        return self.sentence

    def judged(self, rules: Rules) -> Report:
        """Return the report judged again by other rules; nothing is measured again."""
        measured = {k: v for k, v in self.data.items() if k not in ("format", "kind", "verdict", "rules")}
        return Report.of(measured, rules)

    def recorded(self, graft: Graft) -> Graft:
        """Return the graft with the verdict and its numbers on its card, as `audit`, for those who get the file.

        Raises:
            RequestError: the report is about another change.
        """
        about = [g["identity"] for g in self.data["provenance"]["change"]["grafts"]]
        if about != [graft.identity]:
            raise RequestError(
                f"a report about {', '.join(a[:12] for a in about) or 'a tuned model'} for {graft.identity[:12]}",
                expected="the graft that was audited",
                do="audit this graft",
            )
        verdict, data = self.data["verdict"], self.data["provenance"]["data"]
        told = {k: verdict[k] for k in ("verdict", "sentence", "gain", "domains")}
        return replace(graft, card={**graft.card, "audit": {**told, "rules": self.data["rules"], "data": data}})

    def as_dict(self) -> dict[str, Any]:
        """Return the data."""
        return dict(self.data)

    def html(self) -> str:
        """Return the page: one file that needs no network and no script."""
        return page(self.data)

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.html` into a folder and return the page's path.

        Raises:
            RequestError: the path is a file.
        """
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise RequestError(f"the path {target}, a file", expected="a folder", do="choose another path")
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        for name, content in ((JSON, text), (HTML, self.html())):
            work = target / f".{name}.part"
            work.write_text(content, encoding="utf-8")
            os.replace(work, target / name)
        return target / HTML

    @staticmethod
    def load(path: str | Path) -> Report:
        """Read `report.json`, given by itself or by its folder.

        Raises:
            RequestError: nothing is there, it is no report, or a newer format.
        """
        file = Path(path) / JSON if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise RequestError(f"the path {path}", expected=f"a folder with {JSON}", do="check the path")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(f"{file}, which is no JSON", expected="a report", do="write it again") from error
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise RequestError(f"{file}, no report of an audit", expected=f"kind {KIND!r}", do="check the path")
        if data["format"] > FORMAT:
            raise RequestError(
                f"a report of format {data['format']}",
                expected=f"format {FORMAT} or older",
                do="upgrade neurograft: pip install -U neurograft",
            )
        return Report(data)
