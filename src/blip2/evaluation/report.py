"""Self-contained HTML reports."""

from __future__ import annotations

import base64
import html
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from blip2.data.images import ImageError, read_image
from blip2.errors import InputError
from blip2.evaluation.calibration import coverage_curves
from blip2.evaluation.control import COLUMNS, CONTROLS, GAPS, control_rows
from blip2.io import atomic_write

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
.strong { font-weight: 600; }
"""

Card = tuple[Image.Image, Sequence[tuple[str, str]]]
"""An image and the lines of text below it; see :meth:`Report.cards`."""


class Report:
    """An HTML page that is built section by section and written by :meth:`save`."""

    def __init__(self, title: str, introduction: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>"]

    def section(self, title: str, text: str = "") -> None:
        """Add a heading and a paragraph of text."""
        self._parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table of text cells: the first column is left-aligned, all others are right-aligned."""

        def row(cells: Sequence[str], tag: str) -> str:
            classes = ["", *[' class="number"'] * (len(cells) - 1)]
            out = [f"<{tag}{name}>{html.escape(cell)}</{tag}>" for name, cell in zip(classes, cells, strict=True)]
            return f"<tr>{''.join(out)}</tr>"

        self._parts.append(f"<table>{row(columns, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>")

    def plot(self, figure: Any, description: str) -> None:
        """Add a matplotlib figure.

        Args:
            figure: the figure.
            description: text that replaces the figure where images are not shown.
        """
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        self._parts.append(f'<img class="plot" alt="{html.escape(description)}" src="{_data_url(buffer.getvalue())}">')

    def cards(self, cards: Sequence[Card], columns: int | None = None) -> None:
        """Add images with lines of text below them.

        Args:
            cards: for each card, the image and its lines as (style, text). The style is ``right``, ``wrong``, ``dim``,
                ``strong`` or the empty string.
            columns: number of cards per row. None: the width of the page determines the number.
        """
        out = []
        for image, lines in cards:
            below = "".join(f'<div class="{style}">{html.escape(text)}</div>' for style, text in lines)
            out.append(f'<div class="card"><img alt="" src="{_image_url(image)}">{below}</div>')
        style = f' style="grid-template-columns: repeat({columns}, 1fr)"' if columns else ""
        self._parts.append(f'<div class="cards"{style}>{"".join(out)}</div>')

    def save(self, path: Path) -> None:
        """Write the page to a file, which is replaced when the page is complete."""
        head = f"<meta charset='utf-8'><title>{html.escape(self._title)}</title><style>{STYLE}</style>"
        body = "\n".join(self._parts)
        page = f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"
        with atomic_write(path) as file:
            file.write(page.encode(errors="replace"))  # names of files may not be UTF-8


def _data_url(data: bytes, format: str = "png") -> str:
    return f"data:image/{format};base64,{base64.b64encode(data).decode()}"


def _image_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((240, 240))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return _data_url(buffer.getvalue(), "jpeg")


@dataclass(frozen=True)
class Example:
    """One evaluated image, text or question, for the report."""

    score: float | None
    """Score of the prediction; larger is better. None if there is no reference."""
    image: Callable[[], str | bytes | None]
    """Returns the path or the encoded bytes of the image, or None if there is no image."""
    lines: tuple[str, ...]
    """Lines of text below the image. The score determines the color of the second line."""


MAX_EXAMPLES = 12
"""Maximum number of examples in each section of the report."""


def write_evaluation_report(path: Path, metrics: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Write an HTML page with the metrics, and with the best, the worst and randomly drawn examples.

    Args:
        path: the file to write.
        metrics: the content of ``metrics.json``.
        examples: all evaluated images, texts or questions.
    """
    source = metrics.get("model") or metrics["predictions"]
    report = Report(f"{metrics['task']} of {source}", f"{metrics['records']} records of {metrics['data']}")
    report.section("Results")
    plain = {key: value for key, value in metrics.items() if key not in (*CONTROLS, *GAPS.values())}
    report.table(["metric", "value"], [(name, value) for name, value in _flatten(plain) if value])
    if rows := control_rows(metrics):
        report.section(
            "Control",
            "The same records with the images shuffled, so that no record has its own image, and with blank images of"
            " the mean color of the image encoder's preprocessing. A gap of 0 means that the score does not depend on"
            " the images. A dash stands for a score that has no meaning: images that are all blank have no order.",
        )
        report.table(COLUMNS, rows)
    if curves := coverage_curves(metrics):
        report.section(
            "Certainty",
            "Accuracy of the most certain answers, by their share of all questions (docs/calibration.md).",
        )
        with suppress(InputError):  # matplotlib is not installed: the results above have the numbers
            report.plot(plot_coverage(curves), "accuracy of the most certain answers")
    scored = sorted((each for each in examples if each.score is not None), key=lambda each: each.score or 0.0)
    drawn = random.Random(0).sample(list(examples), min(MAX_EXAMPLES, len(examples)))
    sections = {"Best": scored[::-1][:MAX_EXAMPLES], "Worst": scored[:MAX_EXAMPLES], "Drawn at random": drawn}
    for title, shown in sections.items():
        if shown:
            report.section(title)
            report.cards([(_read_image(example), _styled_lines(example)) for example in shown])
    report.save(path)


def _read_image(example: Example) -> Image.Image:
    """Read the image of an example; return a blank image if there is none, as when only predictions are scored."""
    try:
        return read_image(example.image() or b"")
    except ImageError:
        return Image.new("RGB", (8, 8), "white")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            yield f"{prefix}{key}", f"{value:.4f}"
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def _styled_lines(example: Example) -> list[tuple[str, str]]:
    score = example.score
    first, *others = example.lines
    styles = ["" if score is None else "right" if score >= 0.5 else "wrong", *["dim"] * len(others)]
    lines = [("", first), *((style, text) for style, text in zip(styles, others, strict=False) if text)]
    return lines if score is None else [*lines, ("dim", f"{score:.3f}")]


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure that needs no display.

    Args:
        width: width in inches.
        height: height in inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib, which is not installed: pip install 'blip2[demo]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def plot_curves(curves: dict[str, list[dict[str, Any]]], names: Sequence[tuple[str, str]]) -> Any:
    """Plot one panel for each metric, with one line for each run.

    Args:
        curves: the lines of the metrics.jsonl of each run, by the name of the run.
        names: (key in metrics.jsonl, title) of each panel. The values under ``validation_KEY`` are drawn as a dashed
            line in the same panel.

    Returns:
        The matplotlib figure.
    """
    figure = new_figure(3.6 * len(names), 3.0)
    for i, (key, title) in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), i)
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


def plot_coverage(curves: Mapping[str, Mapping[str, float]]) -> Any:
    """Plot the accuracy of the most certain predictions against their share.

    Args:
        curves: :func:`~blip2.evaluation.calibration.accuracy_at_coverage` of each way of predicting, by its name.

    Returns:
        The matplotlib figure.
    """
    figure = new_figure(4.2, 3.0)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot([int(share) for share in curve], [100 * value for value in curve.values()], "o-", label=name)
    axes.set_xlabel("coverage: % of the questions that are answered", fontsize=9)
    axes.set_ylabel("accuracy in %", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def plot_attention(
    images: Sequence[Image.Image], maps: Float[Tensor, "I Q P"], titles: Sequence[str], columns: int = 9
) -> Any:
    """Plot each image, followed by the attention of its first queries as heat maps over the image.

    Args:
        images: the I images, one per row.
        maps: attention of each of Q queries over the P image tokens of a square grid.
        titles: the title of each image.
        columns: maximum number of panels per row, including the image.

    Returns:
        The matplotlib figure.
    """
    count, num_queries, num_tokens = maps.shape
    side = round(num_tokens**0.5)
    shown = min(num_queries, columns - 1)
    figure = new_figure(1.35 * (shown + 1), 1.5 * count)
    for i, image in enumerate(images):
        pixels = np.asarray(image.convert("RGB").resize((168, 168)))
        for column in range(shown + 1):
            axes = figure.add_subplot(count, shown + 1, i * (shown + 1) + column + 1)
            axes.set_axis_off()
            axes.imshow(pixels)
            if column == 0:
                axes.set_title(titles[i], fontsize=8)
                continue
            weights = maps[i, column - 1].reshape(side, side).float().cpu().numpy()
            heat_map = Image.fromarray(weights / max(weights.max(), 1e-9)).resize((168, 168), Image.Resampling.BICUBIC)
            axes.imshow(np.asarray(heat_map), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            axes.set_title(f"query {column}", fontsize=7)
    return figure
