"""From measured numbers and rules to a verdict; a pure function of the report's data, so rules can be changed later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.audits._statistics import holm, p_above, predicted
from neurograft.core.errors import RequestError
from neurograft.report.words import listed, number, signed_interval

SHIP, STOP, UNSURE = "ship", "do not ship", "cannot tell"
KEPT, LOST = "kept", "lost"
GAINED, WORSE = "gained", "worse"
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
    lost = [name for name, found in domains.items() if found["status"] == LOST]
    unsure = [name for name, found in domains.items() if found["status"] == UNSURE]
    if lost or (gain and gain["status"] == WORSE):
        decided = STOP
    elif gain and gain["status"] == GAINED and domains and not unsure:
        decided = SHIP
    else:
        decided = UNSURE
    reasons = _reasons(decided, gain, domains, lost, unsure, rules)
    return {
        "verdict": decided,
        "sentence": f"{decided.capitalize()}: {reasons[0]}.",
        "exit_status": 3 if decided == STOP else 0,
        "reasons": reasons,
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
    floor = max(noise["rerun"], mean + spread, 0.0)
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


def _reasons(
    decided: str,
    gain: Mapping[str, Any] | None,
    domains: Mapping[str, Any],
    lost: list[str],
    unsure: list[str],
    rules: Mapping[str, Any],
) -> list[str]:
    """Return the sentences behind a verdict, the deciding one first."""
    level = f"{100 * rules['level']:g} %"
    found = [_domain_words(name, domains[name], level) for name in lost]
    worse = gain is not None and gain["status"] == WORSE
    gained = _gain_words(gain, level, rules)
    if decided == SHIP:
        kept = (
            "the one kept domain lost no more"
            if len(domains) == 1
            else f"none of the {len(domains)} kept domains lost more"
        )
        return [f"{gained}, and {kept} than noise floor and tolerance allow"]
    if worse:
        found.append(gained)
    if lost and not worse:
        found.append(gained)
    if decided == UNSURE and (gain is None or gain["status"] != GAINED):
        found.append(gained)
    if not domains:
        found.append("no kept domain was measured, so nothing is known of what was lost")
    if unsure:
        found.append(_unsure_words(unsure, domains, rules))
    if decided == UNSURE and gain is not None and gain["status"] == GAINED:
        found.append(gained)
    return found


def _gain_words(gain: Mapping[str, Any] | None, level: str, rules: Mapping[str, Any]) -> str:
    if gain is None:
        return "no gain was measured"
    change, by = gain["change"], gain["by"]
    if change["value"] == 0 and change["low"] == 0 and change["high"] == 0:
        return f"the change makes no difference to the task's {by} on any item"
    told = f"{signed_interval(change, gain['unit'], level)}"
    if change["n"] < rules["min_items"]:
        return f"the task's {by} changed by {told}, but {change['n']} items are too few to decide"
    if gain["status"] == GAINED:
        rose = signed_interval(change, gain["unit"], level, sign=False)
        return f"the task's {by} rose by {rose}"
    if gain["status"] == WORSE:
        return f"the task's {by} changed by {told}, for the worse"
    limit = f"a gain above {number(gain['limit'])}" if gain["limit"] else "a gain"
    return f"the task's {by} changed by {told}, which does not show {limit}"


def _domain_words(name: str, domain: Mapping[str, Any], level: str) -> str:
    key, test = next((k, t) for k, t in domain["tests"].items() if t["status"] == LOST)
    what = "lost" if key == "loss" else f"moved in {key} by"
    told = signed_interval(test["change"], test["unit"], level, sign=False)
    return f"“{name}” {what} {told}, where noise floor and tolerance allow {number(test['limit'])}"


def _unsure_words(unsure: list[str], domains: Mapping[str, Any], rules: Mapping[str, Any]) -> str:
    few = [n for n in unsure if all(t["change"]["n"] < rules["min_items"] for t in domains[n]["tests"].values())]
    names = listed([f"“{name}”" for name in unsure])
    if few == unsure:
        return f"too few items were given for {names}"
    return f"the interval of {names} reaches beyond what noise floor and tolerance allow; more items would tell"
