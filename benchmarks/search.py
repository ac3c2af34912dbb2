"""python benchmarks/search.py FOLDER [--images 1000000] [--spread 0.3] [--bits 3]; other options with --help

An image library of synthetic embeddings: how long its index takes to build, how large it is, how long searches take,
and how many of the ten exact nearest images they find. Nothing is embedded, and no image is read.

An image belongs to one of 1000 topics. Its embedding is that of the topic plus noise, and each of its queries is that
plus noise of the size --spread: 0.05 makes the queries of an image nearly identical, as a collapsed Q-Former does, and
2 makes them differ more than images do. A search is for a query of an image plus noise, as a text about the image would
be.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow

from blip2.search import indexing
from blip2.search.library import MEAN, TABLE, VECTORS, Library, LibraryConfig, connect, library_schema, to_stored
from blip2.search.recall import measure_recall

BATCH, TOPICS = 10_000, 1000


def normalize(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Noise whose vectors have a length of about 1."""
    return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))


def write(library: Library, images: int, spread: float, num_searches: int, seed: int = 0) -> np.ndarray:
    """Write the embeddings, and return `num_searches` vectors to search with."""
    config, schema = library.config, library.table.schema
    rng = np.random.default_rng(0)
    topics = noise(rng, TOPICS, config.image_text_hidden_size)
    if seed:
        rng = np.random.default_rng(seed)
    column, searches = VECTORS if config.vectors == "all" else MEAN, []
    for start in range(0, images, BATCH):
        count = min(BATCH, images - start)
        image = topics[rng.integers(TOPICS, size=count)] + noise(rng, count, config.image_text_hidden_size)
        shape = (count, config.num_query_tokens, config.image_text_hidden_size)
        vectors = normalize(image[:, None] + spread * noise(rng, *shape))
        share = -(-num_searches * count // images)
        searches.append(vectors[:share, 0] + 0.5 * noise(rng, share, shape[2]))
        names = [f"{seed}-{number:08}" for number in range(start, start + count)]
        cells = {"source": ["synthetic"] * count, "image": names, "digest": names}
        cells |= {"captions": [[]] * count, column: to_stored(vectors, config)}
        columns = [pyarrow.array(cells.get(each.name, [None] * count), each.type) for each in schema]
        library.table.add(pyarrow.Table.from_arrays(columns, schema=schema))
    return normalize(np.concatenate(searches)[:num_searches])


def size(folder: Path) -> float:
    """GB of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vectors", choices=("all", "1"), default="all")
    parser.add_argument("--spread", type=float, default=0.3)
    parser.add_argument("--bits", type=int, default=indexing.NUM_BITS, help="bits per dimension in the index")
    parser.add_argument("--searches", type=int, default=200, help="number of searches that are measured")
    parser.add_argument("--added", type=int, default=0, help="number of images that are added to the finished index")
    options = parser.parse_args()
    indexing.NUM_BITS = options.bits
    shutil.rmtree(options.folder, ignore_errors=True)
    config = LibraryConfig("none", "none", options.vectors, options.queries, options.width)
    table = connect(str(options.folder)).create_table(TABLE, schema=library_schema(config))
    library = Library(str(options.folder), table)
    started = time.perf_counter()
    searches = write(library, options.images, options.spread, options.searches)
    written, written_cpu, written_gb = time.perf_counter(), time.process_time(), size(options.folder)
    indexing.optimize(library)
    built, built_cpu = time.perf_counter(), time.process_time()
    result = vars(measure_recall(library, queries=searches))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if options.added:
        write(library, options.added, options.spread, 0, seed=1)
        after = vars(measure_recall(library, queries=searches))
        result |= {f"{name} with added images": after[name] for name in ("recall", "milliseconds_p50")}
        started_again = time.perf_counter()
        indexing.optimize(library)
        result["seconds to optimize with added images"] = time.perf_counter() - started_again
    print(
        json.dumps(
            {
                "images": options.images, "queries": options.queries, "vectors": options.vectors,
                "spread": options.spread, "bits": options.bits, "seconds to write": round(written - started, 1),
                "seconds to build the index": round(built - written, 1),
                "CPU seconds to build the index": round(built_cpu - written_cpu, 1),
                "GB of embeddings": round(written_gb, 3),
                "GB in all": round(size(options.folder), 3), "GB of memory, peak": round(memory, 2),
                **{name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()},
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
