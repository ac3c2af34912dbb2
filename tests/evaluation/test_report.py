import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip2.errors import InputError
from blip2.evaluation.report import Report, new_figure, plot_attention, plot_curves

NASTY = "</p><script src='http://evil.example/x.js'>alert(\"1\")</script> & \"quoted\" 'too' é 猫"


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def images(self) -> list[Image.Image]:
        out = []
        for tag, attributes in self.tags:
            if tag == "img":
                kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", attributes["src"] or "").groups()
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                assert image.format == kind.upper()
                out.append(image)
        return out


def save(report: Report, tmp_path: Path) -> Page:
    report.save(tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def image(width: int = 40, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 30))


def full(nasty: str) -> Report:
    report = Report(nasty, nasty)
    report.section(nasty, nasty)
    report.table([nasty, "b"], [[nasty, "1"]])
    report.cards([(image(), [("right", nasty), ("", "plain")]), (image(600, 300), [("wrong", nasty)])])
    figure = new_figure(2.0, 1.0)
    figure.add_subplot().plot([1, 2])
    report.plot(figure, nasty)
    return report


def test_text_stays_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = save(full(NASTY), tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.texts.count(NASTY) == 9
    assert ("img", NASTY) in [(tag, attributes.get("alt")) for tag, attributes in page.tags]


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    """It can be sent by mail, and opened without a network."""
    pytest.importorskip("matplotlib")
    page = save(full("text"), tmp_path)
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "script", "iframe", "object", "base"})
    for _, attributes in page.tags:
        assert "href" not in attributes
        assert "srcset" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
    style = (tmp_path / "report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    small, wide, plot = page.images
    assert small.size == (40, 40)
    assert wide.size == (240, 120)
    assert small.getpixel((20, 20)) == pytest.approx((200, 30, 30), abs=6)
    assert plot.width > 100


def test_the_image_given_stays_as_it_was(tmp_path: Path) -> None:
    large = image(600, 300)
    Report("a", "b").cards([(large, [])])
    assert large.size == (600, 300)


def test_cards_a_row(tmp_path: Path) -> None:
    report = Report("a", "b")
    report.cards([(image(), [])])
    report.cards([(image(), [])], columns=6)
    page = save(report, tmp_path)
    styles = [attributes.get("style") for _, attributes in page.tags if attributes.get("class") == "cards"]
    assert styles == [None, "grid-template-columns: repeat(6, 1fr)"]


def test_tables(tmp_path: Path) -> None:
    report = Report("a", "b")
    report.table(["name", "r1"], [["ours", "0.5"], ["theirs", "0.4"]])
    page = save(report, tmp_path)
    cells = [(tag, attributes.get("class")) for tag, attributes in page.tags if tag in ("td", "th")]
    assert cells == [("th", None), ("th", "number"), *[("td", None), ("td", "number")] * 2]
    assert page.texts[-6:] == ["name", "r1", "ours", "0.5", "theirs", "0.4"]


# -- plots -----------------------------------------------------------------------------------------------------------


def test_curves() -> None:
    pytest.importorskip("matplotlib")
    ours = [{"step": 1, "itc": 3.0}, {"step": 2, "itc": 2.0, "validation_itc": 2.5}, {"step": 3, "itc": 1.5}]
    theirs = [{"step": 5, "itc": 4.0}]
    figure = plot_curves({"ours": ours, "theirs": theirs}, [("itc", "contrastive loss"), ("itm", "never measured")])
    first, second = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in first.lines}
    assert lines == {
        "ours": [[1, 3.0], [2, 2.0], [3, 1.5]],
        "ours, held out": [[2, 2.5]],
        "theirs": [[5, 4.0]],
    }
    assert first.get_title() == "contrastive loss"
    assert first.get_ylim()[0] == 0
    assert len(second.lines) == 0
    figure.savefig(io.BytesIO())


def test_attention_glows_where_the_query_looks() -> None:
    pytest.importorskip("matplotlib")
    maps = torch.full((2, 5, 16), 0.01)
    maps[1, 2, 7] = 0.8  # of 4 x 4 image tokens: second row, last column
    figure = plot_attention([image(), image(60, 20)], maps, ["one", "two"], columns=4)
    assert len(figure.axes) == 2 * 4  # the image and three queries each
    assert [figure.axes[0].get_title(), figure.axes[4].get_title()] == ["one", "two"]
    axes = figure.axes[4 + 3]
    assert axes.get_title() == "query 3"
    glow = np.asarray(axes.images[1].get_array())
    rows, columns = np.unravel_index(glow.argmax(), glow.shape)
    assert (rows * 4 // glow.shape[0], columns * 4 // glow.shape[1]) == (1, 3)
    assert glow.max() == pytest.approx(1, abs=0.2)
    figure.savefig(io.BytesIO())


def test_plots_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'blip2\[demo\]'"):
        new_figure(1.0, 1.0)
