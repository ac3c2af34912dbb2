"""One self-contained HTML page that shows what a run learned."""

from __future__ import annotations

import base64
import html
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from blip2.data.images import ImageError, read_image
from blip2.errors import InputError

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin-bottom: 1.2rem; }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
.card { border: 1px solid #e2e2e2; border-radius: .4rem; padding: .6rem; font-size: .85rem; }
.card img { width: 100%; height: 8rem; object-fit: contain; } img.plot { max-width: 100%; }
.right { color: #12783a; } .wrong { color: #a33; } .dim { color: #666; }
"""


class Report:
    """A page that grows section by section; :meth:`save` writes it."""

    def __init__(self, title: str, introduction: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>"]

    def section(self, title: str, text: str = "") -> None:
        self._parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows of text; all columns but the first hold numbers."""

        def row(cells: Sequence[str], tag: str) -> str:
            kinds = ["", *[' class="number"'] * (len(cells) - 1)]
            parts = [f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
            return f"<tr>{''.join(parts)}</tr>"

        self._parts.append(f"<table>{row(columns, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>")

    def plot(self, figure: Any, description: str) -> None:
        """A figure of matplotlib."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        self._parts.append(f'<img class="plot" alt="{html.escape(description)}" src="{_data_url(buffer.getvalue())}">')

    def cards(self, cards: Sequence[tuple[Image.Image, Sequence[tuple[str, str]]]], columns: int | None = None) -> None:
        """Pictures with lines of (style, text) below; the styles are right, wrong, dim and none.

        Args:
            columns: cards a row; None: as many as there is room for.
        """
        out = []
        for image, lines in cards:
            below = "".join(f'<div class="{style}">{html.escape(text)}</div>' for style, text in lines)
            out.append(f'<div class="card"><img alt="" src="{_picture_url(image)}">{below}</div>')
        style = f' style="grid-template-columns: repeat({columns}, 1fr)"' if columns else ""
        self._parts.append(f'<div class="cards"{style}>{"".join(out)}</div>')

    def save(self, path: Path) -> None:
        head = f"<meta charset='utf-8'><title>{html.escape(self._title)}</title><style>{STYLE}</style>"
        body = "\n".join(self._parts)
        page = f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"
        path.write_text(page, encoding="utf-8")


def _data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _picture_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((240, 240))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return _data_url(buffer.getvalue(), "jpeg")


@dataclass(frozen=True)
class Case:
    """One of many, to be shown."""

    score: float | None
    """Larger is better; None where the truth is not known."""
    image: Callable[[], str | bytes | None]
    """Gives the path or the bytes of its image, if there is one."""
    lines: tuple[str, ...]


SHOWN = 12
"""Cases of each kind on a page."""


def write_cases(path: Path, metrics: Mapping[str, Any], cases: Sequence[Case]) -> None:
    """A page with the numbers, and the best, the worst and some of all cases."""
    whose = metrics.get("model") or metrics["predictions"]
    report = Report(f"{metrics['task']} of {whose}", f"{metrics['records']} records of {metrics['data']}")
    report.section("Results")
    report.table(["measure", "value"], [(name, value) for name, value in _flat(metrics) if value])
    scored = sorted((case for case in cases if case.score is not None), key=lambda case: case.score or 0.0)
    drawn = random.Random(0).sample(list(cases), min(SHOWN, len(cases)))
    for title, some in (("Best", scored[::-1][:SHOWN]), ("Worst", scored[:SHOWN]), ("Drawn at random", drawn)):
        if some:
            report.section(title)
            report.cards([(_picture(case), _lines(case)) for case in some])
    report.save(path)


def _picture(case: Case) -> Image.Image:
    """Its image; a blank one where predictions were given whose images are not there."""
    try:
        return read_image(case.image() or b"")
    except ImageError:
        return Image.new("RGB", (8, 8), "white")


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} ")
        elif isinstance(value, float):
            yield f"{before}{key}", f"{value:.4f}"
        else:
            yield f"{before}{key}", "" if value is None else str(value)


def _lines(case: Case) -> list[tuple[str, str]]:
    style = "" if case.score is None else "right" if case.score >= 0.5 else "wrong"
    first, *others = case.lines
    score = [] if case.score is None else [("dim", f"{case.score:.3f}")]
    return [
        ("", first),
        *((style if number == 0 else "dim", text) for number, text in enumerate(others) if text),
        *score,
    ]


def new_figure(width: float, height: float) -> Any:
    """An empty figure that needs no screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need the extra blip2[demo]: pip install 'blip2[demo]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_curves(curves: dict[str, list[dict[str, Any]]], names: Sequence[tuple[str, str]]) -> Any:
    """One panel for each of `names` (key in metrics.jsonl, title), with a line for each run in `curves`.

    Where a run has measured the same on held-out pairs (``validation_...``), that is drawn as a dashed line.
    """
    figure = new_figure(3.6 * len(names), 3.0)
    for number, (key, title) in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), number)
        for color, (run, rows) in enumerate(curves.items()):
            for name, style, label in ((key, "-", run), (f"validation_{key}", "--", f"{run}, held out")):
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{color}", label=label, linewidth=1.5)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def plot_attention(
    images: Sequence[Image.Image], maps: Float[Tensor, "I Q P"], titles: Sequence[str], columns: int = 9
) -> Any:
    """Each image, then what its first queries look at, as a glow over the image.

    Args:
        maps: attention over P = side * side image tokens.
    """
    count, queries, tokens = maps.shape
    side = round(tokens**0.5)
    shown = min(queries, columns - 1)
    figure = new_figure(1.35 * (shown + 1), 1.5 * count)
    for i, image in enumerate(images):
        picture = np.asarray(image.convert("RGB").resize((168, 168)))
        for column in range(shown + 1):
            axes = figure.add_subplot(count, shown + 1, i * (shown + 1) + column + 1)
            axes.set_axis_off()
            axes.imshow(picture)
            if column == 0:
                axes.set_title(titles[i], fontsize=8)
                continue
            weights = maps[i, column - 1].reshape(side, side).float().cpu().numpy()
            glow = Image.fromarray(weights / max(weights.max(), 1e-9)).resize((168, 168), Image.Resampling.BICUBIC)
            axes.imshow(np.asarray(glow), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            axes.set_title(f"query {column}", fontsize=7)
    return figure
