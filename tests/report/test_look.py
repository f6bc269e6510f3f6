"""How the page looks: contrast, text that fits, pages of unusual audits."""

import copy
import re
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from tests.report.test_page import changed, parsed

import neurograft as ng
from neurograft.pipeline._demo_page import STYLE
from neurograft.report import charts, drifts, maps
from neurograft.report._fit import shortened, spread, wide
from neurograft.report._svg import fitted, scale
from neurograft.report.report import Report
from neurograft.report.words import MINUS, number
from neurograft.worlds.pico import pico, pico_batch

CSS = files("neurograft.report").joinpath("page.css").read_text(encoding="utf-8")
LONG = "a very long name of a domain from a/path/without_any_space_in_it/of/some/file.jsonl"
# Signs of other scripts, some of them twice as wide.
NAMES = ["日本語の質問と答えの長い名前", "Русская литература", "العربية", LONG, *"abcdefghij"]


def luminance(colour):
    text = colour.lstrip("#")
    text = "".join(c * 2 for c in text) if len(text) == 3 else text
    parts = [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def themes(css):
    return [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]


def test_contrast_meets_wcag_aa_in_light_dark_and_print():
    assert contrast("#000", "#fff") == pytest.approx(21)
    assert len(themes(CSS)) == 3
    for theme in themes(CSS):
        for text in ("ink", "soft", "good", "bad", "unsure", "change", "c1", "c2", "c3"):
            for ground in ("paper", "panel"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        assert contrast(theme["null"], theme["paper"]) >= 3  # a graphical object, never text
    assert not re.search(r"\.t\.null|color: var\(--null\)", CSS)
    for page, demo in zip(themes(CSS), themes(STYLE)):
        assert all(contrast(colour, page["paper"]) >= 3 for colour in demo.values())


def test_print_is_the_light_theme_and_what_is_folded_is_open():
    light, _, printed = themes(CSS)
    assert {k: v for k, v in light.items() if k != "line"} == {k: v for k, v in printed.items() if k != "line"}
    assert "details::details-content" in CSS.split("@media print")[2]


@pytest.fixture(scope="module")
def base():
    model = pico("llama")
    rules = {"draws": 100, "nulls": 3}
    keep = {"a": [pico_batch(model, batch=9, seed=2)]}
    found = ng.audit(model, changed(model), gain=[pico_batch(model, batch=9, seed=1)], keep=keep, rules=rules)
    return copy.deepcopy(found.as_dict())


@pytest.fixture(scope="module")
def many(base):
    """Fourteen domains, moved by steps of 0.01, with an outsized random change."""
    domains = {}
    for i, name in enumerate(NAMES):
        domains[name] = one = copy.deepcopy(base["domains"]["a"])
        change = one["loss"]["measures"]["loss"]["change"]
        for key in ("value", "low", "high"):
            change[key] += 0.01 * i
        one["loss"]["measures"]["loss"]["noise_floor"]["nulls"][0] = 5.0
    return Report({**base, "domains": domains}).judged(None).data


def shapes(svg):
    root = ElementTree.fromstring(svg)
    return root, [float(v) for v in root.get("viewBox").split()[2:]]


def test_drawings_of_many_domains_stay_inside_and_their_names_apart(many):
    html = Report(many).html()
    parsed(html)
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        root, (width, height) = shapes(svg)
        for shape in root.iter():
            for keys, most in ((("x", "cx", "x1", "x2"), width), (("y", "cy", "y1", "y2"), height)):
                assert all(-0.5 <= float(shape.get(k, 0)) <= most + 0.5 for k in keys), ElementTree.tostring(shape)
            if shape.tag == "text" and "up" not in shape.get("class"):
                x, long = float(shape.get("x")), 6.2 * wide(shape.text or "")
                first = {"start": x, "middle": x - long / 2, "end": x - long}[shape.get("text-anchor")]
                assert first >= -6, shape.text
                assert first + long <= width + 6, shape.text
    svg = charts.tradeoff(many["gain"], many["domains"], many["verdict"]["domains"])
    root, _ = shapes(svg)
    names = [t for t in root.iter("text") if "halo" in t.get("class")]
    assert len(names) == charts.NAMED
    places = sorted(float(t.get("y")) for t in names)
    assert all(b - a >= 12.5 for a, b in pairwise(places))
    assert names[0].text == NAMES[-1]  # the largest loss is named first
    assert "and 6 more" in root.get("aria-label")


def test_of_many_domains_the_worst_come_first_and_the_rest_is_folded(many):
    html = Report(many).html()
    titles = re.findall(r"<h3>Items of ([^<]*)</h3>", html)
    judged = many["verdict"]["domains"]
    assert sorted(titles) == sorted(NAMES)
    order = {"lost": 0, "cannot tell": 1, "kept": 2}
    assert [order[judged[n]["status"]] for n in titles] == sorted(order[judged[n]["status"]] for n in titles)
    assert titles[0] == NAMES[-1]
    assert html.count("<details>") >= 3
    first = html.split("<details>")[0] if "more reason" not in html else html.split("<details>")[1]
    assert first.count("<h3>Items of") <= 6
    assert "8 more pictures" in html


def test_of_many_domains_four_drifts_are_named(many):
    moved = {n: copy.deepcopy(d["representation_drift"]) for n, d in many["domains"].items()}
    for i, found in enumerate(moved.values()):
        found["layers"][0]["cka_drift"]["value"] = 0.6 + 0.01 * i
    root, _ = shapes(drifts.drift_lines(moved, "cka_drift"))
    assert "at most: j 0.73, i 0.72, h 0.71, g 0.7" in root.get("aria-label")
    assert len([t for t in root.iter("text") if re.search(r"\bc\d\b", t.get("class"))]) == drifts.COLOURS
    assert len([p for p in root.iter("path") if p.get("class") == "curve null"]) == len(NAMES) - drifts.COLOURS


@pytest.mark.parametrize("layers", [1, 48, 200])
def test_maps_of_any_depth_are_no_taller_than_a_screen(base, layers):
    names = [f"model.layers.{i}" for i in range(layers)]
    one = base["whole"]["weight_drift"]["parameters"][0]
    parameters = [{**one, "name": f"{n}.mlp.up_proj.weight", "layer": n} for n in names]
    parameters.append({**one, "name": "lm_head.weight", "layer": "outside of the layers"})
    root, (_, height) = shapes(maps.neuron_map(parameters, names))
    assert height < 420
    lanes = [r for r in root.iter("rect") if r.get("class") == "lane"]
    assert len(lanes) == layers + 1  # none left out
    texts = sorted(float(t.get("y")) for t in root.iter("text"))[:-2]
    assert all(b - a >= 9 for a, b in pairwise(texts))
    bars = [{"name": n, "relative": 0.1, "entries": 5} for n in [*names, "outside of the layers"]]
    root, _ = shapes(drifts.weight_bars(bars, names))
    under = sorted((float(t.get("x")), t.text) for t in root.iter("text") if float(t.get("y")) == 164)
    assert under[-1][1] == "elsewhere"
    assert all(b - a > 3.2 * (wide(s) + wide(t)) for (a, s), (b, t) in pairwise(under))


def test_nothing_at_all_is_drawn_against_an_axis_of_one(base):
    zero = copy.deepcopy(base["domains"]["a"]["representation_drift"])
    for layer in zero["layers"]:
        layer["cka_drift"]["value"] = layer["noise_floor"]["cka_drift"]["value"] = 0.0
    svg = drifts.drift_lines({"a": zero}, "cka_drift")
    assert f"e{MINUS}" not in svg
    assert ">1</text>" in svg


def test_a_single_layer_has_dashes_for_lines(base):
    one = {**base["domains"]["a"]["representation_drift"]}
    one["layers"] = one["layers"][:1]
    root, _ = shapes(drifts.drift_lines({"a": one}, "cka_drift"))
    assert all("L" in p.get("d") for p in root.iter("path"))


def test_rows_and_columns_of_tables_are_named_and_headings_go_down_by_one(many):
    html = Report(many).html()
    for row in re.findall(r"<tr>(.*?)</tr>", html, re.S):
        assert row.startswith(('<th scope="row">', '<th scope="col">'))
    assert not re.findall(r"<th[^>]*></th>", html)
    levels = [int(n) for n in re.findall(r"<h(\d)>", html)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_labels_move_apart_and_stay_between_the_ends():
    assert spread([5, 5, 5], 0, 10, 3) == [4, 7, 10]
    assert spread([50.0], 0, 10, 3) == [10]
    assert spread([0, 0, 0], 0, 1, 3) == [0, 0.5, 1]  # closer where there is no room
    assert spread([], 0, 1, 3) == []


def test_texts_are_cut_by_the_columns_they_take():
    for text in NAMES:
        for limit in (8, 14, 20):
            assert wide(shortened(text, limit)) <= limit
    assert (shortened("日本語", 6), wide("日本語")) == ("日本語", 6)
    assert wide("e\N{COMBINING ACUTE ACCENT}") == 1


@pytest.mark.parametrize(
    ("low", "high"), [(-0.0489, 0.0277), (0, 1), (-0.00123, 0.00456), (0, 3e-6), (-98765, 1234567)]
)
@pytest.mark.parametrize("room", [150, 300])
def test_ticks_have_room_side_by_side(low, high, room):
    at = scale(low, high, 0, room)
    found = fitted(at, low, high)
    assert 1 <= len(found) <= 7
    for a, b in pairwise(found):
        assert at(b) - at(a) >= 3.2 * (wide(number(a)) + wide(number(b)))


@pytest.mark.parametrize("high", [1e-4, 5e-4, 0.001, 0.9, 12345.0, 3e-7])
def test_numbers_of_an_upright_axis_are_not_cut_off(base, high):
    names = [f"model.layers.{i}" for i in range(3)]
    root, _ = shapes(drifts.weight_bars([{"name": n, "relative": high, "entries": 5} for n in names], names))
    ends = [t for t in root.iter("text") if t.get("text-anchor") == "end"]
    assert len(ends) >= 2
    assert all(float(t.get("x")) >= 6.4 * wide(t.text) for t in ends)


def test_the_zone_of_an_interval_ends_at_its_limit_and_the_line_at_its_ends():
    change = {"value": 0.4, "low": 0.2, "high": 0.8}
    root, _ = shapes(charts.interval_bar(change, 0.6, (0.0, 1.0), "kept"))
    zone, whisker = root.find("rect"), root.findall("line")[1]
    assert (float(zone.get("x")), float(zone.get("width"))) == pytest.approx((14, 0.6 * 152), abs=0.1)
    assert (float(whisker.get("x1")), float(whisker.get("x2"))) == pytest.approx((44.4, 135.6), abs=0.1)
    assert root.get("aria-label") == "+0.4, +0.2 to +0.8"
    assert shapes(charts.interval_bar(change, 7.0, (0.0, 1.0), "kept"))[0].find("rect").get("width") == "152"


def test_what_is_accepted_ends_at_the_smallest_limit(many):
    judged = {
        n: {**d, "tests": {"loss": {**d["tests"]["loss"], "limit": 3.0}}} for n, d in many["verdict"]["domains"].items()
    }
    judged["a"]["tests"]["loss"]["limit"] = 2.0
    root, _ = shapes(charts.tradeoff(many["gain"], many["domains"], judged))
    edge = next(e for e in root.iter("line") if e.get("class") == "edge")
    grid = {t.text: float(t.get("y")) - 4 for t in root.iter("text") if t.get("text-anchor") == "end"}
    assert float(edge.get("y1")) == pytest.approx(grid["2"], abs=0.2)


def test_the_gains_limit_is_not_called_its_noise_floor(base):
    html = Report(base).judged({"gain_above": 0.77}).html()
    row = html.split("What was gained on the task")[1].split("<b>")[1].split("</tr>")[0]
    cells = re.findall(r"<td>(.*?)</td>", row, re.S)
    floor = Report(base).judged({"gain_above": 0.77}).data["verdict"]["gain"]["floor"]
    assert cells[4:6] == ["0.77", number(floor)]


def test_where_the_loss_sits_says_on_how_many_items(base):
    data = copy.deepcopy(base)
    damage, loss = data["domains"]["a"]["damage"], data["domains"]["a"]["loss"]
    damage["whole"], loss["items"] = 0.4321, 50
    assert "On the first 9 of 50 items the whole change costs +0.432 nats." in Report(data).html()
    loss["items"] = 9
    assert "On 9 items the whole change costs +0.432 nats." in Report(data).html()


def test_labels_beside_a_map_and_beside_bars_are_whole():
    """Letters are about 6.8 wide here, and `m` is wider: BERT's and Wav2Vec2's labels lost their first letters."""
    layers = [f"encoder.layer.{i}" for i in range(2)]
    names = [f"{layer}.{rest}" for layer in layers for rest in ("intermediate.dense.bias", "feed_forward.output_dense")]
    rows = [{"name": n, "layer": n[:15], "units": {"norms": [1.0, 0.0]}} for n in names]
    change = {"value": 0.1, "low": 0.0, "high": 0.2}
    bars = maps.damage_bars({"parts": [{"name": n, "change": change} for n in names]}, layers)
    for svg in (maps.neuron_map(rows, layers), bars):
        labels = [t for t in shapes(svg)[0].iter("text") if t.get("text-anchor") == "end" and "…" in t.text]
        assert len(labels) == 4
        assert all(float(t.get("x")) >= 6.8 * wide(t.text) for t in labels)


def test_items_that_lie_far_from_zero_are_seen():
    """Their bars were narrower than a hair: 3 items of a metric of its own scale made an empty picture."""
    edges = [39.0 + 0.15 * i for i in range(25)]
    found = {
        "items": 3,
        "histogram": {"edges": edges, "counts": [1, *[0] * 22, 2]},
        "measures": {"loss": {"change": {"value": 40.5}}},
    }
    bars = [r for r in shapes(charts.distribution(found, "nats"))[0].iter("rect") if "bar" in r.get("class")]
    assert min(float(r.get("width")) for r in bars if float(r.get("height")) > 0) >= 1.5
