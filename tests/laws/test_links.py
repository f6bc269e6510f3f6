"""Pages for people: their links lead somewhere, and their pictures have words, in light and dark."""

import importlib
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
PICTURES = sorted((ROOT / "docs" / "images").iterdir())
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def prose(text):
    """Return a page without its code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(text):
    """Return the names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


def broken(page):
    found = []
    for _, _, target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if (
            not to.exists()
            or ROOT not in (to, *to.parents)
            or (anchor and anchor not in anchors(to.read_text(encoding="utf-8")))
        ):
            found.append(target)
    return found


def test_relative_links_lead_to_files_and_headings():
    assert len(PAGES) > 60
    assert {str(page.relative_to(ROOT)): b for page in PAGES if (b := broken(page))} == {}


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text("# One thing\n[x](b.md) [y](#one-thing) [z](#other) `[c](d)` ![i](../a.md) [w](https://a.b/c)\n")
    assert broken(page) == ["b.md", "#other", "../a.md"]


def test_every_picture_is_shown_somewhere_and_described():
    shown = set()
    for page in PAGES:
        for image, words, target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
            shown.add((page.parent / target).resolve())
            assert not image or len(words) > 8, f"{page.name}: {target} has no description"
    assert [p.name for p in PICTURES if p.resolve() not in shown] == []


def luminance(colour):
    text = colour if len(colour) == 6 else "".join(c * 2 for c in colour)
    parts = [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("path", [p for p in PICTURES if p.suffix == ".svg"], ids=lambda p: p.stem)
def test_drawings_can_be_read_in_light_and_dark(path):
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.get("aria-label")
    assert "<script" not in text
    assert not re.search(r"(href|src)=", text)
    style = next(e.text for e in root.iter() if e.tag.endswith("style"))
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    ground = [re.search(r"\.paper\{fill:#(\w+)\}", part)[1] for part in (light, dark)]
    for part, paper in zip((light, dark), ground):
        for rule, colour in re.findall(r"(text|\.s)\{[^}]*fill:#(\w+)", part):
            assert contrast(colour, paper) >= 4.5, (rule, colour, paper)
        for rule, colour in re.findall(r"(\.(?:c\d|one|best|reference))\{(?:stroke:#\w+;)?fill:#(\w+)", part):
            assert contrast(colour, paper) >= 3, (rule, colour, paper)
    width, height = (float(v) for v in root.get("viewBox").split()[2:])
    for shape in root.iter():
        for keys, most in ((("x", "cx", "x1", "x2"), width), (("y", "cy", "y1", "y2"), height)):
            assert all(0 <= float(shape.get(k, 0)) <= most for k in keys), ElementTree.tostring(shape)


DRAWN = {
    "editing": ("_curves", "methods"),
    "selective": ("_pareto", "contenders"),
    "selective_images": ("_pareto", "contenders"),
}


def test_every_drawing_is_what_its_benchmark_draws_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert set(DRAWN) == {p.stem for p in PICTURES if p.suffix == ".svg"}
    for name, (module, key) in DRAWN.items():
        results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        drawn = importlib.import_module(module).picture(results[key])
        assert drawn == (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8"), name
