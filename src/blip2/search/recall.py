"""Measure how many of the exact nearest images the approximate search of a library finds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from blip2.errors import InputError
from blip2.search.library import MEAN, VECTORS, Library, convert_lance_errors, read_vectors

BATCH_ROWS = 4096


@dataclass(frozen=True)
class RecallReport:
    """The result of :func:`measure_recall`."""

    rows: int
    """Number of images in the library."""
    has_index: bool
    """Whether the library has an index. Without one, every search is exact."""
    queries: int
    """Number of searches."""
    k: int
    recall: float
    """The share of the `k` exact nearest images that were found."""
    milliseconds_p50: float
    """Median time of a search by a vector."""
    milliseconds_p99: float


def measure_recall(
    library: Library | str | Path, k: int = 10, num_queries: int = 100, queries: Float[np.ndarray, "N C"] | None = None
) -> RecallReport:
    """Compare approximate searches with exact ones over all images.

    Args:
        library: the library, or its folder or URI.
        k: number of images per search.
        num_queries: number of searches.
        queries: unit vectors to search with. None: vectors of images that are in the library, chosen at random.

    Returns:
        The recall at `k`. An image counts as found if it is as similar as the `k`-th exact one, so that equally similar
        images can stand for each other. For a library of means, similarity is that of the mean.

    Raises:
        InputError: the library does not exist, cannot be read, or is empty.
    """
    library = library if isinstance(library, Library) else Library.open(library)
    column = VECTORS if library.config.vectors == "all" else MEAN
    num_rows = len(library)
    if not num_rows:
        raise InputError(f"the library {library.uri} has no images: add some with blip2 index")
    if queries is None:
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.choice(num_rows, min(num_queries, num_rows), replace=False)).tolist()
        with convert_lance_errors(library.uri):
            rows = library.table.take_offsets(chosen).select([column]).to_arrow()
        vectors = read_vectors(rows, library.config)
        queries = vectors[np.arange(len(vectors)), rng.integers(vectors.shape[1], size=len(vectors))]
    with convert_lance_errors(library.uri):
        reader = library.table.search().select(["digest", column]).to_batches(BATCH_ROWS)
        top = np.empty((len(queries), 0), np.float32)
        digests = np.empty((len(queries), 0), "U32")
        for batch in reader:
            if len(batch):
                names, first = np.unique(batch["digest"].to_pylist(), return_index=True)
                vectors = read_vectors(batch, library.config)[first]
                similarity = (vectors.reshape(-1, vectors.shape[-1]) @ queries.T).reshape(*vectors.shape[:2], -1).max(1)
                top, digests = _merge(top, digests, similarity.T, np.broadcast_to(names, similarity.T.shape), k)
    found, seconds = 0, []
    for query, scores in zip(queries, top, strict=True):
        started = time.perf_counter()
        hits = library.find_similar(query[None], k)
        seconds.append(time.perf_counter() - started)
        found += min(sum(hit.similarity >= scores[-1] - 1e-5 for hit in hits), len(scores))
    times = 1000 * np.percentile(seconds, [50, 99])
    with convert_lance_errors(library.uri):
        has_index = any(each.columns == [column] for each in library.table.list_indices())
    return RecallReport(num_rows, has_index, len(queries), k, found / top.size, float(times[0]), float(times[1]))


def _merge(
    top: np.ndarray, digests: np.ndarray, similarity: np.ndarray, names: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` largest similarities of each query with the digests of their images, each digest once.

    `top` and `similarity` contain each digest at most once, but both may contain the same.
    """
    size = min(k, similarity.shape[1])
    part = np.argpartition(-similarity, size - 1, axis=1)[:, :size]
    top = np.concatenate([top, np.take_along_axis(similarity, part, 1)], axis=1)
    digests = np.concatenate([digests, np.take_along_axis(names, part, 1)], axis=1)
    scores, kept = [], []
    for row, keys in zip(top, digests, strict=True):
        order = np.argsort(-row, kind="stable")
        _, first = np.unique(keys[order], return_index=True)
        order = order[np.sort(first)][:k]
        scores.append(row[order])
        kept.append(keys[order])
    return np.stack(scores), np.stack(kept)
