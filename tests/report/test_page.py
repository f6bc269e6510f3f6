"""The page: one file, no network, no script, every number where it belongs."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

import neurograft as ng
from neurograft.core.grafts.delta import Slice
from neurograft.core.grafts.graft import Graft
from neurograft.core.region import Region
from neurograft.report._svg import ticks
from neurograft.report.report import Report
from neurograft.worlds.pico import pico, pico_batch

HOSTILE = "<script>alert('x')</script> & \"more\""


def changed(model):
    deltas = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and min(weight.shape) >= 32 and "embed" not in name:
            region = Region.of(weight.shape, "rows", [1, 2, 30])
            noise = torch.randn(region.values_shape, generator=torch.Generator().manual_seed(len(name)))
            deltas[name] = Slice(region, region.read(weight) + 0.1 * noise)
    return Graft.made(model, deltas, card={"recipe": {"name": HOSTILE}})


@pytest.fixture(scope="module", params=["llama", "bert", "vit"])
def report(request):
    model = pico(request.param)
    keep = {HOSTILE: [pico_batch(model, batch=9, seed=2)], "plain": [pico_batch(model, batch=9, seed=3)]}
    gain = [pico_batch(model, batch=9, seed=1)]
    return ng.audit(model, changed(model), gain=gain, keep=keep, rules={"draws": 300, "nulls": 3})


class Tags(HTMLParser):
    """Collects tags and attributes, and whether every opened tag is closed."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self):
        super().__init__()
        self.found, self.open, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(html):
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags.open
    return tags


def test_it_needs_neither_network_nor_script(report):
    html = report.html()
    tags = parsed(html)
    assert not {"script", "link", "iframe", "img", "object"} & set(tags.found)
    assert not [a for a in tags.attributes if a[0] in ("src", "href", "onload", "onclick", "xlink:href")]
    assert not re.search(r"https?://|url\(|@import|data:\w+/", html)


def test_what_users_named_is_text_and_nothing_else(report):
    html = report.html()
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html


def test_the_first_sentence_is_the_verdict(report):
    body = report.html().split("<main>")[1]
    words = re.sub(r"<[^>]+>", "", body.split("</h1>")[0]).strip()
    assert words.replace("&#x27;", "'").startswith(report.verdict.capitalize() + ":")
    assert f'class="verdict {report.verdict.replace(" ", "-")}"' in body


def test_every_part_is_there(report):
    html = report.html()
    for title in ("Gain against loss", "Neuron map", "Weights, by layer", "Representations, by layer"):
        assert f"<h3>{title}</h3>" in html
    for part in ("Items of plain", "Where the loss sits: plain", "Calibration: task", "Provenance", "tolerance"):
        assert part in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label")
        assert "nan" not in svg.lower().replace("tenant", "")
        assert "inf" not in re.sub(r"<title>.*?</title>|aria-label=\"[^\"]*\"|<text.*?</text>", "", svg)


def test_drawings_stay_inside_their_frames(report):
    for svg in re.findall(r"<svg.*?</svg>", report.html(), re.S):
        root = ElementTree.fromstring(svg)
        width, height = (float(v) for v in root.get("viewBox").split()[2:])
        for shape in root.iter():
            for key, most in (("x", width), ("cx", width), ("x1", width), ("x2", width)):
                assert -0.5 <= float(shape.get(key, 0)) <= most + 0.5, ElementTree.tostring(shape)
            for key, most in (("y", height), ("cy", height), ("y1", height), ("y2", height)):
                assert -0.5 <= float(shape.get(key, 0)) <= most + 0.5, ElementTree.tostring(shape)
            assert float(shape.get("width", 1)) > 0


def test_the_same_data_give_the_same_bytes(report, tmp_path):
    report.save(tmp_path / "a")
    Report.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_json_keeps_its_keys(report):
    data = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    keys = ["format", "kind", "verdict", "rules", "gain", "task", "domains", "whole", "neurons", "provenance"]
    assert list(data) == keys
    assert (data["format"], data["kind"]) == (1, "neurograft-audit")
    assert {"verdict", "sentence", "exit_status", "reasons", "gain", "domains"} == set(data["verdict"])
    domain = data["domains"]["plain"]
    assert {"loss", "divergence", "calibration", "representation_drift", "damage"} <= set(domain)
    assert {"unit", "better", "base", "changed", "change", "noise_floor"} <= set(domain["loss"]["measures"]["loss"])
    assert {"value", "low", "high", "level", "n", "quantiles"} == set(domain["loss"]["measures"]["loss"]["change"])
    assert {"base", "change", "data", "seed", "device", "threads", "versions"} == set(data["provenance"])
    assert set(data["whole"]) == {"weight_drift"}


def test_an_empty_graft_and_a_lone_gain_have_pages_too():
    model = pico("llama")
    batch = [pico_batch(model, batch=9)]
    for given in ({"gain": batch}, {"keep": {"a": batch}}, {"gain": batch, "keep": {"a": batch}, "probes": "none"}):
        html = ng.audit(model, Graft(), rules={"draws": 100}, **given).html()
        parsed(html)
        assert "makes no difference" in html or "no gain was measured" in html
        assert ("pictures count items" in html) == ("keep" in given)


def test_a_page_promises_no_picture_that_it_lacks():
    model = pico("llama")
    rules, batch = {"draws": 100, "nulls": 3}, [pico_batch(model, batch=9)]
    html = ng.audit(model, changed(model), gain=batch, rules=rules).html()
    assert "What was moved.<" in html
    both = ng.audit(model, changed(model), gain=batch, keep={"a": batch}, rules=rules).html()
    assert "outputs moved with it, and which parts of the change do the harm" in both


def test_files_that_are_no_report_are_refused(tmp_path, report):
    with pytest.raises(ng.RequestError, match="folder with"):
        Report.load(tmp_path / "nothing")
    (tmp_path / "report.json").write_text('{"kind": "else"}')
    with pytest.raises(ng.RequestError, match="no report"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**report.as_dict(), "format": 99}))
    with pytest.raises(ng.RequestError, match="format 99"):
        Report.load(tmp_path)
    with pytest.raises(ng.RequestError, match="a file"):
        report.save(tmp_path / "report.json")


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(-3, 7) == [-2.5, 0, 2.5, 5]
    for low, high in ((1e-9, 3e-9), (-500.0, 1234.0), (0.0, 0.017)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7
        assert all(low - 1e-15 <= t <= high + 1e-9 * abs(high) for t in found)


def test_no_path_of_this_machine_stands_on_the_page(report, tmp_path):
    data = json.loads(json.dumps(report.as_dict()))
    data["provenance"]["base"]["name"] = "/home/somebody/models/base-1b"
    data["provenance"]["change"]["grafts"][0]["card"]["selection"] = {
        "rule": "top",
        "located": {"model": {"name": "/home/somebody/models/base-1b"}, "examples": ["0123456789abcdef"] * 50},
    }
    html = Report(data).html()
    assert "base-1b" in html
    assert "/home/somebody" not in html
    assert "rule top, located (model (name base-1b), examples 50)" in html
