"""The demo's result as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines, the first column to the left.

    Example:
        >>> table(["a", "b"], [["x", "10"]])
        ['a   b', 'x  10']
    """
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
        for r in [head, *rows]
    ]


def lines(data: Mapping[str, Any]) -> list[str]:
    """Return the page as lines of text, the first sentence first."""
    undo, seconds = data["undo"], data["seconds"]
    found = [data["sentence"], ""]
    found += [f"{data['facts']} capitals moved, taught in English with 12 old questions beside 24 new ones in a step;"]
    found += [
        f"{data['steps']} steps, {len(data['seeds'])} seeds; learning rates chosen on phrasings of their own.",
        "",
    ]
    found += ["Each at its learning rate with the best transfer on validation:", *_contenders(data["far"]), ""]
    found += ["Located minus each of the others, with 95 % intervals over countries or questions:"]
    found += [*_differences(data["far"]), ""]
    found += ["Each at its learning rate with the least harm on validation:", *_contenders(data["careful"]), ""]
    found += ["Rise of the loss on old questions (nats), by skill:", *_cells(data["forgetting"]["skill"]), ""]
    found += ["and by language:", *_cells(data["forgetting"]["language"]), ""]
    found += [f"graft of the located neurons: {data['graft']['path']} ({data['graft']['bytes']:,} bytes)"]
    found += [f"example: {undo['question']} before: {undo['before']}, with the graft: {undo['during']}"]
    found += [f"taken off again: {undo['after']}; digest of all weights {undo['digest'][:16]}, "]
    found[-1] += "the same as before, bit for bit" if undo["identical"] else "NOT the same as before"
    if data.get("report"):
        found += [f"audit of that graft: {data['report']['verdict']}: {data['report']['path']}"]
    found += [f"page: {data['page']}", f"{seconds:.0f} s in all, {data['processes']} processes of one thread"]
    return found


def _contenders(part: Mapping[str, Any]) -> list[str]:
    head = ["", "numbers", "rate", "half-time", "English", "unheard", "other lang.", "old skills", "loss rise"]
    head += ["other capitals", "ms/step", "saved kB", "file kB"]
    rows = []
    for name, row in part["contenders"].items():
        rows.append(
            [name, f"{row['trained']:,}", f"{row['rate']:g}"]
            + [_share(row, k) for k in ("half_time", "gain", "unheard", "transfer", "old")]
            + [f"{row['harm']:+.3f}", _share(row, "other_capitals"), f"{row['step_ms']:.0f}"]
            + [f"{row['saved_bytes'] / 1e3:,.0f}", f"{row['file_bytes'] / 1e3:,.0f}"]
        )
    return table(head, rows)


def _share(row: Mapping[str, Any], key: str) -> str:
    spread = row.get(key + "_sd")
    return f"{row[key]:.2f}" + (f"±{spread:.2f}" if spread is not None else "")


def _differences(part: Mapping[str, Any]) -> list[str]:
    def shown(found: Mapping[str, float], digits: int) -> str:
        return f"{found['difference']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"

    rows = [
        [name, shown(found["transfer"], 2), shown(found["harm"], 3)] for name, found in part["located_minus"].items()
    ]
    return table(["", "other languages (higher is better)", "loss rise on old (lower is better)"], rows)


def _cells(cells: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    names = list(next(iter(cells.values())))
    return table(["", *names], [[c, *(f"{found[n]['harm']:+.2f}" for n in names)] for c, found in cells.items()])
