"""The query of a search on the command line, and the results as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from blip2.data.images import IMAGE_SUFFIXES, ImageError, read_image
from blip2.evaluation.report import Report
from blip2.io import convert_os_errors
from blip2.pipelines import draw_attention
from blip2.search.library import Hit, Library


def parse_query(query: str) -> str | Path:
    """Return a query as a path if it has the suffix of an image file; else return it unchanged, as a text."""
    return Path(query) if query.lower().endswith(IMAGE_SUFFIXES) else query


def write_page(library: Library, query: str | Path, hits: Sequence[Hit], path: Path) -> None:
    """Write a self-contained HTML page with the images that a search found.

    Next to each image is the image with the attention of the queries drawn over it: for a text, that of matching (ITM),
    in which the queries read the text as well; for an image, that of the queries alone.

    Args:
        library: the library.
        query: the query.
        hits: the results of the search.
        path: the file to write.

    Raises:
        InputError: the file cannot be written.
    """
    report = Report(str(query), f"{len(hits)} of {len(library)} images in {library.uri}")
    cards: list[tuple[Image, list[tuple[str, str]]]] = []
    for number, hit in enumerate(hits, 1):
        scores = [f"ITC {hit.similarity:.3f}", *([] if hit.match is None else [f"ITM {hit.match:.3f}"])]
        lines = [("", f"{number}. {', '.join(scores)}"), ("", "".join(hit.captions[:1])), ("dim", hit.image)]
        lines += [("dim", f"{name}: {value}") for name, value in hit.metadata.items()]
        try:
            image = read_image(library.read_image(hit), f"image {hit.image}")
        except ImageError as error:
            report.section(hit.image, str(error))
            continue
        maps = library.pipeline.attention_maps([image], query if isinstance(query, str) else None)
        cards += [(image, lines), (draw_attention(image, maps[0, -1]), [("dim", "attention of the queries")])]
    report.cards(cards)
    with convert_os_errors(path):
        report.save(path)
