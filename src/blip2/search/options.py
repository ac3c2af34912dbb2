"""Options of search. The command line is made from this module, so it does not import PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blip2.config import bounded

Vectors = Literal["all", "1"]
"""The vectors that a library stores for each image: those of all queries, or their mean."""
MAX_RESULTS = 10_000
"""Maximum number of results of a search, and of images that are re-ranked."""


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search, and the forms in which its results are shown."""

    k: int = bounded(10, 1, MAX_RESULTS)
    """Maximum number of results."""
    where: str | None = None
    """Condition on the metadata in SQL, such as "year >= 2020 AND place = 'Rome'". null: all images."""
    rerank_k: int = bounded(20, 0, MAX_RESULTS)
    """Number of images, the best by similarity (ITC), that are read again and re-ranked by matching (ITM, §4.4) if the
    query is a text. 0: none."""
    as_json: bool = field(default=False, metadata={"option": "json"})
    """Print JSON instead of a table."""
    html: Path | None = None
    """HTML page to write: the images that were found, with their scores, and where the best query of each looked at the
    image. null: no page."""
