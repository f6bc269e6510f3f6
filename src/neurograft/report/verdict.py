"""From measured numbers and rules to a verdict; a pure function of the report's data, so rules can be changed later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.audits._statistics import holm, p_above, predicted
from neurograft.core.errors import RequestError
from neurograft.report.reasons import GAINED, KEPT, LOST, SHIP, STOP, UNSURE, WORSE, reasons

TAIL = 0.05


def verdict(data: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    """Decide whether a change should ship.

    "ship": the gain's interval lies above 0 and above its noise floor, and every domain's loss interval ends below
    noise floor + tolerance. "do not ship": a domain's loss interval lies beyond that limit, at a level corrected for
    the number of domains (Holm), or the gain's interval lies as far below 0. "cannot tell" otherwise: an interval
    straddles its limit, there are too few items, or gain or domains were not measured.

    Args:
        data: a report's `gain` and `domains`.
        rules: see `rules.DEFAULT`.

    Returns:
        `verdict`, `sentence`, `exit_status` (3 for "do not ship"), `reasons`, `gain` and `domains` (limits, p-values
        and status of each).
    """
    gain = _gain(data.get("gain"), rules)
    domains = _domains(data.get("domains", {}), rules)
    lost = sorted(
        (name for name, found in domains.items() if found["status"] == LOST), key=lambda n: -_excess(domains[n])
    )
    unsure = [name for name, found in domains.items() if found["status"] == UNSURE]
    if lost or (gain and gain["status"] == WORSE):
        decided = STOP
    elif gain and gain["status"] == GAINED and domains and not unsure:
        decided = SHIP
    else:
        decided = UNSURE
    found = reasons(decided, gain, domains, lost, unsure, rules)
    return {
        "verdict": decided,
        "sentence": f"{decided.capitalize()}: {found[0]}.",
        "exit_status": 3 if decided == STOP else 0,
        "reasons": found,
        "gain": gain,
        "domains": domains,
    }


def _gain(measured: Mapping[str, Any] | None, rules: Mapping[str, Any]) -> dict[str, Any] | None:
    if not measured:
        return None
    by = measured["by"]
    measure = measured["measures"][by]
    change, noise = measure["change"], measure["noise_floor"]
    mean, spread = predicted(noise["nulls"], tail=TAIL / 2)
    # Where no random change gained anything, their spread, however wide, is one of harm and no measure of luck.
    lucky = mean + spread if any(v > 0 for v in noise["nulls"]) else 0.0
    floor = max(noise["rerun"], lucky, 0.0)
    limit = max(rules["gain_above"], floor)
    below = -max(noise["rerun"], min(spread, rules["floor_cap"]))
    status = UNSURE
    if change["n"] >= rules["min_items"] and change["low"] is not None:
        status = GAINED if change["low"] > limit else WORSE if change["high"] < below else UNSURE
    shown = {k: change[k] for k in ("value", "low", "high", "n")}
    return {"by": by, "unit": measure["unit"], "change": shown, "floor": floor, "limit": limit, "status": status}


def _domains(measured: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    tests = {}
    for name, audits in measured.items():
        for key, accepted in {"loss": _tolerance(name, rules), **rules["limits"]}.items():
            tests[name, key] = _test(_measure(audits, key, name), accepted, len(measured), rules)
    p = {f"{name}\x1f{key}": test["p"] for (name, key), test in tests.items()}
    adjusted = holm(p) if rules["correction"] == "holm" else p
    half = (1 - rules["level"]) / 2
    found: dict[str, Any] = {name: {"tests": {}} for name in measured}
    for (name, key), test in tests.items():
        test["p_adjusted"] = adjusted[f"{name}\x1f{key}"]
        enough = test["change"]["n"] >= rules["min_items"] and test["change"]["low"] is not None
        high = test["change"]["high"]
        flagged = enough and test["p_adjusted"] <= half
        test["status"] = LOST if flagged else KEPT if enough and high <= test["limit"] else UNSURE
        found[name]["tests"][key] = test
    for one in found.values():
        states = [test["status"] for test in one["tests"].values()]
        one["status"] = LOST if LOST in states else UNSURE if UNSURE in states else KEPT
    return found


def _excess(domain: Mapping[str, Any]) -> float:
    """Return how far a lost domain lies beyond its limit, of the test that is told first: the worst is said first."""
    test = next(t for t in domain["tests"].values() if t["status"] == LOST)
    return float(test["change"]["value"] - test["limit"])


def _tolerance(domain: str, rules: Mapping[str, Any]) -> float:
    return float(rules["tolerances"].get(domain, rules["tolerance"]))


def _measure(found: Mapping[str, Any], key: str, domain: str) -> Mapping[str, Any]:
    known = {k: m for audit in found.values() for k, m in audit.get("measures", {}).items()}
    if key not in known:
        raise RequestError(
            f"a limit for {key!r}, which was not measured on {domain!r}",
            expected=f"one of {', '.join(sorted(known))}",
            do="add the probe that measures it, or drop the limit",
        )
    measure: Mapping[str, Any] = known[key]
    return measure


def _test(measure: Mapping[str, Any], accepted: float, domains: int, rules: Mapping[str, Any]) -> dict[str, Any]:
    change, noise = measure["change"], measure["noise_floor"]
    _, spread = predicted(noise.get("nulls", ()), tail=TAIL / max(1, domains))
    floor = max(noise.get("rerun", 0.0), spread)
    excused = min(floor, rules["floor_cap"])
    limit = accepted + excused
    p = p_above(change, limit) if "quantiles" in change else 1.0
    return {
        "unit": measure["unit"],
        "change": {k: change[k] for k in ("value", "low", "high", "n") if k in change},
        "floor": floor,
        "excused": excused,
        "null_mean": noise.get("null_mean", 0.0),
        "accepted": accepted,
        "limit": limit,
        "p": p,
    }
