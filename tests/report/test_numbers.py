"""Every number that the page shows is one of the report's data, written in few digits."""

import re
from collections.abc import Mapping
from html.parser import HTMLParser

import pytest
from tests.report.test_page import changed

import neurograft as ng
from neurograft.report.report import Report
from neurograft.report.words import MINUS, number
from neurograft.worlds.pico import pico, pico_batch

SIGNS = f"+{MINUS}"
NUMBER = re.compile(rf"(?<![\w.])[{SIGNS}]?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:e{MINUS}?\d+)?(?!\w)")
# Tables, tiles, facts and captions; what pointers and screen readers are told of a picture stands in its titles.
READ = ("table", "dl", "figcaption", "h1", "title", "header")
# "1 %" of the end bars, and 1 less CKA, are words of the page.
SAID = {"1"}


class Shown(HTMLParser):
    """Collects the text in tables, tiles, captions and tooltips, and the descriptions of pictures."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.texts += [v for k, v in attrs if k in ("aria-label", "title")]

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        axis = "text" in self.open  # ticks are the drawing's
        if set(READ) & set(self.open) and not axis and "code" not in self.open:
            self.texts.append(data)


def leaves(data):
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from leaves(key)
            yield from leaves(value)
    elif isinstance(data, (list, tuple)):
        yield len(data)
        for value in data:
            yield from leaves(value)
    else:
        yield data


def forms(data):
    """Return how numbers of the data may be written: in three digits, whole, as per cent; and numbers in its texts."""
    found = set(SAID)
    for value in leaves(data):
        if isinstance(value, str):
            found |= set(NUMBER.findall(value.replace("-", MINUS))) | set(NUMBER.findall(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            texts = [number(value), f"{value:,}", str(value), f"{100 * value:.1f}", f"{100 * value:.3g}"]
            found |= {t.lstrip(SIGNS) for t in texts}
    return {t.lstrip(SIGNS) for t in found}


@pytest.fixture(scope="module")
def report():
    model = pico("llama")
    keep = {"a": [pico_batch(model, batch=9, seed=2)], "b": [pico_batch(model, batch=9, seed=3)]}
    gain, rules = [pico_batch(model, batch=9, seed=1)], {"draws": 300, "nulls": 3}
    return ng.audit(model, changed(model), gain=gain, keep=keep, rules=rules)


def strangers(html, data):
    read = Shown()
    read.feed(html)
    known, weights = forms(data), data["whole"]["weight_drift"]
    known.add(f"{100 * weights['entries'] / weights['total']:.3g}")
    return [(n, text) for text in read.texts for n in NUMBER.findall(text) if n.lstrip(SIGNS) not in known]


def test_every_number_shown_is_in_the_data(report):
    assert len(NUMBER.findall(report.html())) > 300
    assert strangers(report.html(), report.data) == []


@pytest.mark.parametrize("place", ["base", "changed", "value"])
def test_a_number_that_is_not_in_the_data_is_found(report, place):
    m = report.data["domains"]["a"]["loss"]["measures"]["loss"]
    shown = {**m, place: 0.98765} if place != "value" else {**m, "change": {**m["change"], "value": 0.98765}}
    domain = {
        **report.data["domains"]["a"],
        "loss": {**report.data["domains"]["a"]["loss"], "measures": {"loss": shown}},
    }
    other = Report({**report.data, "domains": {**report.data["domains"], "a": domain}})
    assert {n.lstrip("+") for n, _ in strangers(other.html(), report.data)} == {"0.988"}
