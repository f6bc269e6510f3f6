"""The reasons of a verdict, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neurograft.report.words import counted, listed, number, signed_interval

SHIP, STOP, UNSURE = "ship", "do not ship", "cannot tell"
KEPT, LOST = "kept", "lost"
GAINED, WORSE = "gained", "worse"
NAMED = 5


def reasons(
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
    # "changed by 0.1 of the items", and of a metric of the caller's own, which has no unit, by 0.1
    unit = "" if gain["unit"] == by else gain["unit"].replace("share of ", "of the ")
    told = signed_interval(change, unit, level)
    if change["n"] < rules["min_items"]:
        few = f"{counted(change['n'], 'item')} {'is' if change['n'] == 1 else 'are'} too few to decide"
        return f"the task's {by} changed by {told}, but {few}"
    if gain["status"] == GAINED:
        rose = signed_interval(change, unit, level, sign=False)
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
    told = [f"“{name}”" for name in unsure]
    names = listed(told if len(told) <= NAMED else [*told[: NAMED - 1], f"{len(told) - NAMED + 1} more"])
    if few == unsure:
        return f"too few items were given for {names}"
    reach = "interval of {} reaches" if len(unsure) == 1 else "intervals of {} reach"
    return f"the {reach.format(names)} beyond what noise floor and tolerance allow; more items would tell"
