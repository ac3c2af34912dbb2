"""A library of images with their embeddings, in a table of LanceDB, and the search in it.

A library is a LanceDB database, in a folder or on object storage, with one table, :data:`TABLE`: a row for each image
of each source. Its columns are those of :func:`library_schema`, followed by the metadata of the images. The metadata of
the schema holds the :class:`LibraryConfig`.

Legend: N images, Q queries, C width of the contrastive embeddings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import torch
from jaxtyping import Float
from torch import Tensor

from blip2.checkpoint import trained_state_dict
from blip2.config import Precision
from blip2.data.images import ImageError, ImageLike, preprocess, read_bytes, read_image
from blip2.data.shards import is_url
from blip2.errors import InputError
from blip2.feature_cache.digests import hash_weights
from blip2.feature_cache.store import digest
from blip2.io import expand_home, parse_json
from blip2.pipelines import RepresentationPipeline, load
from blip2.search.options import MAX_RESULTS, Vectors

if TYPE_CHECKING:
    from lancedb.table import Table

TABLE = "images"
"""Name of the table of a library."""
FORMAT = 1
"""Version of the format of libraries."""
CONFIG_KEY = b"blip2"
"""Key of the library's config in the metadata of the table's schema."""
VECTORS, MEAN = "vectors", "mean"
"""Column of the vectors of all queries [Q, C], or of their normalized mean [C]."""
OWN_COLUMNS = (
    "source", "image", "captions", "digest", "size", "modified", "record", "data", VECTORS, MEAN,
)  # fmt: skip
"""Names of the columns that are not metadata."""
ENDPOINT_VARIABLES = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
"""Environment variables with the address of a server that speaks S3."""
EXACT_ROWS = 10_000
"""Up to this number of candidate rows, a search compares the query with all of them and uses no index."""
OVERSAMPLING = 4
"""This many times the number of results is requested from the index. LanceDB searches a multivector column vector by
vector, so that several of the nearest vectors may belong to the same image, and fewer images are found."""
MIN_SHORTLIST = 200
"""Minimum number of images that are requested from the index."""


@dataclass(frozen=True)
class LibraryConfig:
    """The properties of a library that never change."""

    model: str
    """The checkpoint of the stage-1 model with which the library was made."""
    model_digest: str
    """Digest of the model; see :func:`model_digest`."""
    vectors: Vectors
    """``all``: the vectors of all queries of an image are stored. ``1``: their mean."""
    num_query_tokens: int
    """Q."""
    image_text_hidden_size: int
    """C."""
    format: int = FORMAT


@dataclass(frozen=True)
class Hit:
    """An image that a search found."""

    image: str
    """The path of the image; or, for an image that is stored in the library, its name in its source."""
    similarity: float
    """ITC: the largest cosine similarity of the text to a query of the image, in [-1, 1]. For an image as the query:
    the mean, over its queries, of the largest cosine similarity."""
    match: float | None = None
    """ITM: the probability that image and text match. None: the image was not re-ranked."""
    captions: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The metadata of the image by column."""
    duplicates: tuple[str, ...] = ()
    """Other images of the library with the same bytes."""
    source: str = ""
    """The source of the image, as it was given to :func:`blip2.search.index`."""
    digest: str = ""
    """The digest of the image's bytes."""
    problem: str | None = None
    """The reason why the image could not be re-ranked. None: there is no such problem."""

    def as_json(self) -> dict[str, Any]:
        """Return the hit as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class LibraryError(InputError):
    """A library that cannot be read or written, for a reason that is not in what was asked of it."""


class OtherModelError(InputError):
    """A library is opened with a model other than the one that made it."""


class Library:
    """A library of images that can be searched with words or with an image.

    :meth:`open` and :meth:`create` make instances. Reading always uses the newest state of the library. One process at
    a time may write to it.

    Args:
        uri: folder or URI of the library.
        table: its table.
        pipeline: the model with which the library was made. None: it is loaded before the first search.
    """

    def __init__(self, uri: str, table: Table, pipeline: RepresentationPipeline | None = None) -> None:
        self.uri, self.table = uri, table
        self.config = _read_config(uri, table)
        self._loading: dict[str, Any] = {"path": self.config.model}
        self._pipeline: RepresentationPipeline | None = None
        if pipeline is not None:
            self._use(pipeline)

    @classmethod
    def open(
        cls,
        uri: str | Path,
        model: RepresentationPipeline | str | Path | None = None,
        *,
        device: str | None = None,
        dtype: Precision | None = None,
        overrides: Mapping[str, object] | None = None,
    ) -> Library:
        """Open a library.

        Args:
            uri: folder of the library, or its URI on object storage (``s3://bucket/library``, ``gs://``, ``az://``).
            model: the stage-1 model with which the library was made, or its checkpoint, which is loaded before the
                first search. None: the checkpoint that the library names.
            device, dtype, overrides: how the checkpoint is loaded; see :func:`blip2.load`.

        Raises:
            InputError: there is no library, LanceDB is not installed, or `model` is another model.
        """
        uri = library_uri(uri)
        database = connect(uri)
        with convert_lance_errors(uri):
            is_there = (
                TABLE in database.list_tables().tables if is_url(uri) else (Path(uri) / f"{TABLE}.lance").is_dir()
            )
            if not is_there:
                raise InputError(f"there is no library in {uri}: check the path, or make one with blip2 index")
            table = database.open_table(TABLE)
        library = cls(uri, table, model if isinstance(model, RepresentationPipeline) else None)
        path = library.config.model if model is None else model
        library._loading = {"path": path, "device": device, "dtype": dtype, "overrides": overrides}
        return library

    @classmethod
    def create(cls, uri: str | Path, pipeline: RepresentationPipeline, vectors: Vectors = "all") -> Library:
        """Create an empty library, to which :func:`blip2.search.index` adds images.

        Args:
            uri: folder of the library, which may be missing, or its URI on object storage.
            pipeline: the stage-1 model that embeds the images.
            vectors: ``all``: store the vectors of all queries of an image. ``1``: store their mean, which takes Q times
                less space; a search then reads the images of the shortlist again to compute their exact similarities.

        Raises:
            InputError: there already is a library, the folder cannot be written, or LanceDB is not installed.
        """
        uri = library_uri(uri)
        qformer = pipeline.config.qformer
        config = LibraryConfig(
            _absolute(pipeline.path),
            model_digest(pipeline),
            vectors,
            qformer.num_query_tokens,
            qformer.image_text_hidden_size,
        )
        with convert_lance_errors(uri):
            database = connect(uri)
            if TABLE in database.list_tables().tables:
                raise InputError(f"{uri} already contains a library: open it, or give another output")
            table = database.create_table(TABLE, schema=library_schema(config))
        return cls(uri, table, pipeline)

    def __len__(self) -> int:
        """Return the number of rows: images, including duplicates."""
        with convert_lance_errors(self.uri):
            return self.table.count_rows()

    @property
    def columns(self) -> dict[str, str]:
        """The metadata columns that ``where`` may name, and their types."""
        with convert_lance_errors(self.uri):
            schema = self.table.schema
        return {each.name: str(each.type) for each in schema if each.name not in OWN_COLUMNS}

    @property
    def pipeline(self) -> RepresentationPipeline:
        """The stage-1 model, which is loaded when it is first used.

        Raises:
            InputError: the model cannot be loaded, or is not the model with which the library was made.
        """
        if self._pipeline is None:
            try:
                pipeline = load(**self._loading, stage="representation")
            except InputError as error:
                raise InputError(
                    f"the library {self.uri} was made with the model {self.config.model}, but {self._loading['path']}"
                    f" cannot be loaded ({error}): give the model with which it was made"
                ) from error
            assert isinstance(pipeline, RepresentationPipeline)
            self._use(pipeline)
        assert self._pipeline is not None
        return self._pipeline

    def _use(self, pipeline: RepresentationPipeline) -> None:
        if model_digest(pipeline) != self.config.model_digest:
            raise OtherModelError(
                f"the library {self.uri} was made with the model {self.config.model}, whose weights are not those of"
                f" {pipeline.path}: give that model, or make a library with this one"
            )
        self._pipeline = pipeline

    # -- search --------------------------------------------------------------------------------------------------------

    def search(
        self,
        query: str | ImageLike,
        k: int = 10,
        where: str | None = None,
        rerank_k: int = 20,
    ) -> list[Hit]:
        """Find the images that are most similar to a text or to an image.

        A shortlist is made by similarity (ITC); its best `rerank_k` images are then re-ranked by matching (ITM, §4.4).
        They are ranked by the sum of ITM's log-odds and the similarity divided by ITC's temperature, because ITM has
        learned from pairs that ITC finds similar. Images with the same bytes count as one.

        Args:
            query: a text; or an image as a ``Path``, bytes, a PIL image or an array.
            k: maximum number of results.
            where: a condition on the metadata in SQL, such as ``year >= 2020 AND place = 'Rome'``. None: all images.
            rerank_k: number of images of the shortlist that are read again and re-ranked; no images are re-ranked for
                an image as the query. 0: none. Then a library with ``vectors="1"`` ranks by the similarity of the mean.

        Returns:
            At most `k` hits, the best first. Images that were re-ranked come before the others.

        Raises:
            InputError: the text is blank, the image cannot be decoded, `where` is not a condition on columns of the
                library, a number is out of range, or the model is not the library's.
        """
        for name, value, low in (("k", k, 1), ("rerank_k", rerank_k, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_RESULTS:
                raise InputError(f"{name} is {value!r}, expected a whole number from {low} to {MAX_RESULTS}")
        if isinstance(query, str):
            return self.search_vectors(self.pipeline.embed_texts(query), k, where, rerank_k, query)
        image = read_image(query)
        return self.search_vectors(self.pipeline.embed_images(image)[0], k, where, rerank_k)

    def search_vectors(
        self,
        query: Float[Tensor, "V C"],
        k: int = 10,
        where: str | None = None,
        rerank_k: int = 0,
        text: str | None = None,
    ) -> list[Hit]:
        """Find the images that are most similar to embeddings; see :meth:`search`.

        Args:
            query: unit vectors: one for a text, Q for an image.
            k, where, rerank_k: see :meth:`search`.
            text: the text, by which images are re-ranked. None: no re-ranking by ITM.
        """
        vectors = query.float().cpu().numpy()
        mean_only = self.config.vectors == "1"
        found = self.find_similar(vectors, max(OVERSAMPLING * k if mean_only and rerank_k else k, rerank_k), where)
        features: dict[int, Tensor] = {}
        problems: dict[int, str] = {}
        similarity = np.asarray([each.similarity for each in found], np.float32)
        if rerank_k and found and (mean_only or text is not None):
            read, size = len(found) if mean_only else min(rerank_k, len(found)), self.pipeline.batch_size
            for start in range(0, read, size):  # the images of a long shortlist do not fit into memory together
                part, missing = self._read_features(found, range(start, min(start + size, read)))
                problems |= missing
                features |= part
                if mean_only and part:
                    embedded = self.pipeline.embed_images(torch.stack(list(part.values()))).float().cpu().numpy()
                    similarity[list(part)] = exact_similarity(vectors, embedded)
                    kept = sorted(sorted(features), key=lambda number: -similarity[number])[:rerank_k]
                    features = {} if text is None else {number: features[number] for number in kept}
        order = np.argsort(-similarity, kind="stable").tolist()
        matches: dict[int, tuple[float, float]] = {}  # the score by which images are ranked, and the probability
        if text is not None:
            chosen = [number for number in order if number in features][:rerank_k]
            if chosen:
                stacked = torch.stack([features[number] for number in chosen])
                candidates = torch.zeros(len(chosen), 1, dtype=torch.long)
                logits = self.pipeline.match_candidates(stacked, [text], candidates)[:, 0].float().cpu()
                scaled = torch.from_numpy(similarity[chosen]) / self.pipeline.itc_temperature
                scores = (logits[:, 1] - logits[:, 0] + scaled).tolist()
                probabilities = self.pipeline.match_probability(logits).tolist()
                matches = dict(zip(chosen, zip(scores, probabilities, strict=True), strict=True))
                order.sort(key=lambda number: -matches[number][0] if number in matches else math.inf)
        return [
            replace(
                found[number],
                similarity=float(similarity[number]),
                match=matches[number][1] if number in matches else None,
                problem=problems.get(number),
            )
            for number in order[:k]
        ]

    def find_similar(self, query: Float[np.ndarray, "V C"], wanted: int, where: str | None = None) -> list[Hit]:
        """Return the images that are most similar by the stored vectors, the best first.

        Args:
            query: unit vectors: one for a text, Q for an image.
            wanted: maximum number of images, which have different bytes.
            where: see :meth:`search`.
        """
        if replace(_read_config(self.uri, self.table), model=self.config.model) != self.config:
            raise LibraryError(f"the library {self.uri} was made anew with another model or `vectors`: open it again")
        shortlist = max(OVERSAMPLING * wanted, MIN_SHORTLIST)
        candidates = self._count(where)
        if candidates > max(EXACT_ROWS, shortlist):
            rows = self._nearest(query, shortlist, where, exact=False)
            if _distinct(rows) >= wanted:
                return _to_hits(rows, query, self.config)[:wanted]
        exact = wanted  # there is no index, or it found too few
        while True:
            rows = self._nearest(query, exact, where, exact=True)
            if _distinct(rows) >= wanted or exact >= candidates:
                break
            exact = min(OVERSAMPLING * exact, candidates)
        return _to_hits(rows, query, self.config)[:wanted]

    def _count(self, where: str | None) -> int:
        with convert_lance_errors(self.uri, where, self):
            return self.table.count_rows(None if where is None else _whole(where))

    def _nearest(self, query: np.ndarray, limit: int, where: str | None, exact: bool) -> pyarrow.Table:
        """Return the nearest rows, with all columns but the images' bytes.

        Args:
            exact: whether to compare the query with all rows instead of using the index.
        """
        with convert_lance_errors(self.uri, where, self):
            column = VECTORS if self.config.vectors == "all" else MEAN
            vectors = query if column == VECTORS else _mean(query[None])[0]
            chosen = [each.name for each in self.table.schema if each.name != "data"]
            search: Any = self.table.search(vectors if len(vectors) > 1 else vectors[0], vector_column_name=column)
            search = search.distance_type("cosine").limit(limit).select([*chosen, "_distance"])
            # All partitions are searched: few save little time, and embeddings without clusters lose results with them.
            search = search.bypass_vector_index() if exact else search.nprobes(self.table.count_rows())
            if where is not None:
                search = search.where(_whole(where))
            return self._read(search)

    def _read(self, search: Any) -> pyarrow.Table:
        """Run a query of LanceDB, a second time if a writer has deleted the files of the version that was read."""
        version = self.table.version
        try:
            return search.to_arrow()
        except (RuntimeError, OSError, ValueError):
            if self.table.version == version:
                raise
            return search.to_arrow()

    # -- images --------------------------------------------------------------------------------------------------------

    def read_image(self, hit: Hit) -> bytes:
        """Return the encoded bytes of an image that was found.

        Raises:
            ImageError: the file cannot be read, or has changed since it was indexed.
        """
        condition = f"source = {sql_text(hit.source)} AND image = {sql_text(hit.image)}"
        with convert_lance_errors(self.uri):
            rows = self._read(self.table.search().where(condition).select(["data"]).limit(1))
        if len(rows) and (data := rows["data"][0].as_py()) is not None:
            return data
        data = read_bytes(hit.image)
        if digest(data) != hit.digest:
            raise ImageError(f"image {hit.image} has changed since it was indexed: run blip2 index again")
        return data

    def read_image_by_digest(self, image_digest: str) -> bytes | None:
        """Return the encoded bytes of the image with a digest, the ``digest`` of its hits; None if there is none.

        Raises:
            ImageError: see :meth:`read_image`.
        """
        with convert_lance_errors(self.uri):
            condition = f"digest = {sql_text(image_digest)}"
            rows = self._read(self.table.search().where(condition).select(["source", "image", "digest"]).limit(1))
        if not len(rows):
            return None
        source, image, found = (rows[name][0].as_py() for name in ("source", "image", "digest"))
        return self.read_image(Hit(image, 0.0, source=source, digest=found))

    def _read_features(self, hits: Sequence[Hit], chosen: range) -> tuple[dict[int, Tensor], dict[int, str]]:
        """Encode some of the images of hits again.

        Returns:
            The features [P, E] of the images that can be read, and the problems of the others, by position.
        """
        pixels: dict[int, Tensor] = {}
        problems: dict[int, str] = {}
        for number in chosen:
            hit = hits[number]
            try:
                image = read_image(self.read_image(hit), f"image {hit.image}")
                pixels[number] = preprocess(image, self.pipeline.model.vision.preprocessing)
            except ImageError as error:
                problems[number] = str(error)
        if not pixels:
            return {}, problems
        features = self.pipeline.encode_pixels(torch.stack(list(pixels.values())))
        return dict(zip(pixels, features, strict=True)), problems

    def delete(self, where: str) -> int:
        """Delete the images for which a condition holds, and return their number.

        An image that is still in its source comes back when the source is indexed again. The caller must hold no other
        writer.

        Args:
            where: a condition, as in :meth:`search`, or on ``source``, such as ``source = '/old/photos'``.
        """
        count = self._count(where)
        with convert_lance_errors(self.uri, where, self):
            self.table.delete(_whole(where))
        return count


# -- schema and vectors ------------------------------------------------------------------------------------------------


def library_schema(config: LibraryConfig) -> pyarrow.Schema:
    """Return the schema of the table of a library without metadata.

    Its columns are: ``source`` and ``image``, which together name a row; ``captions``; ``digest``, of the bytes of the
    image; ``size`` and ``modified``, the size in bytes and the time of modification in nanoseconds of the image file,
    or null; ``record``, the digest of captions and metadata; ``data``, the bytes of an image that is not a file, or
    null; and the vectors in float16.
    """
    vector = pyarrow.list_(pyarrow.float16(), config.image_text_hidden_size)
    stored = {VECTORS: pyarrow.list_(vector)} if config.vectors == "all" else {MEAN: vector}
    fields = {
        "source": pyarrow.string(),
        "image": pyarrow.string(),
        "captions": pyarrow.list_(pyarrow.string()),
        "digest": pyarrow.string(),
        "size": pyarrow.int64(),
        "modified": pyarrow.int64(),
        "record": pyarrow.string(),
        "data": pyarrow.large_binary(),
        **stored,
    }
    return pyarrow.schema(fields, {CONFIG_KEY: json.dumps(asdict(config)).encode()})


def _read_config(uri: str, table: Table) -> LibraryConfig:
    with convert_lance_errors(uri):
        metadata = table.schema.metadata or {}
    found = parse_json(metadata[CONFIG_KEY]) if CONFIG_KEY in metadata else {}
    if found.get("format") != FORMAT:
        what = f"has the format {found['format']}" if "format" in found else "was not made by blip2 index"
        raise InputError(f"the table {TABLE} in {uri} {what}, expected format {FORMAT}: make the library again")
    return LibraryConfig(**found)


def model_digest(pipeline: RepresentationPipeline) -> str:
    """Return a digest of what determines the embeddings of a model, on any device and for any data type of its encoder.

    These are the trained weights outside the image encoder, the image size and the normalization of texts.
    """
    hasher = hashlib.blake2b(digest_size=16)
    weights = {n: w for n, w in trained_state_dict(pipeline.model).items() if not n.startswith("vision.")}
    hash_weights(hasher, sorted(weights.items()))
    size = pipeline.model.vision.preprocessing.image_size
    hasher.update(json.dumps([size, pipeline.config.text_normalization]).encode())
    return hasher.hexdigest()


def to_stored(vectors: Float[np.ndarray, "N Q C"], config: LibraryConfig) -> pyarrow.Array:
    """Convert the vectors of images to the column that the library stores."""
    width, halves = config.image_text_hidden_size, vectors.astype(np.float16)
    if config.vectors == "1":
        halves = _mean(vectors).astype(np.float16)
    flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(halves.reshape(-1)), width)
    if config.vectors == "1":
        return flat
    offsets = np.arange(0, halves.shape[0] * halves.shape[1] + 1, halves.shape[1], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), flat)


def _mean(vectors: Float[np.ndarray, "N Q C"]) -> Float[np.ndarray, "N C"]:
    """Return the normalized means over the queries."""
    mean = vectors.astype(np.float32).mean(axis=1)
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def read_vectors(rows: pyarrow.Table | pyarrow.RecordBatch, config: LibraryConfig) -> Float[np.ndarray, "N Q C"]:
    """Return the stored vectors of rows in float32. Q is 1 for the mean."""
    num_vectors = config.num_query_tokens if config.vectors == "all" else 1
    column: Any = rows[VECTORS if config.vectors == "all" else MEAN]
    column = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    values = column.flatten().flatten() if config.vectors == "all" else column.flatten()
    return values.to_numpy().astype(np.float32).reshape(len(rows), num_vectors, config.image_text_hidden_size)


def exact_similarity(query: Float[np.ndarray, "V C"], vectors: Float[np.ndarray, "N Q C"]) -> Float[np.ndarray, "N"]:
    """Return the similarity of a query to images: the mean over its vectors of the maximum over the image's queries."""
    return (vectors @ query.T).max(axis=1).mean(axis=1)


def _distinct(rows: pyarrow.Table) -> int:
    """Return the number of images with different bytes."""
    return len(set(rows["digest"].to_pylist()))


def _to_hits(rows: pyarrow.Table, query: np.ndarray, config: LibraryConfig) -> list[Hit]:
    """Return one hit for each group of rows with equal bytes, sorted by exact similarity."""
    if config.vectors == "1":
        query = _mean(query[None])
    similarity = exact_similarity(query, read_vectors(rows, config))
    metadata = [each.name for each in rows.schema if each.name not in (*OWN_COLUMNS, "_distance")]
    values = rows.select(["source", "image", "captions", "digest", *metadata]).to_pylist()
    hits: dict[str, Hit] = {}
    for number in np.argsort(-similarity, kind="stable").tolist():
        row = values[number]
        if row["digest"] in hits:
            first = hits[row["digest"]]
            hits[row["digest"]] = replace(first, duplicates=(*first.duplicates, row["image"]))
            continue
        hits[row["digest"]] = Hit(
            row["image"],
            float(similarity[number]),
            captions=tuple(row["captions"] or ()),
            metadata={name: row[name] for name in metadata if row[name] is not None},
            source=row["source"],
            digest=row["digest"],
        )
    return list(hits.values())


# -- LanceDB -----------------------------------------------------------------------------------------------------------


def library_uri(uri: str | Path) -> str:
    """Return the URI of a library; for a folder, its absolute path."""
    text = str(uri).removeprefix("file://")
    return text if is_url(text) else str(expand_home(text).absolute())


def _absolute(path: Path) -> str:
    return str(path.absolute()) if path.exists() else str(path)


def connect(uri: str) -> Any:
    """Connect to the database of a library. It is created when the first table is written.

    Raises:
        InputError: LanceDB is not installed, or cannot use the URI.
    """
    os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of each partition that is empty
    try:
        import lancedb
    except ImportError as error:
        raise InputError("image search needs LanceDB, which is not installed: pip install 'blip2[search]'") from error
    for name in ENDPOINT_VARIABLES if uri.startswith("s3") else ():
        value = os.environ.get(name)
        if value is not None and not re.fullmatch(r"https?://[^\s/?#:]\S*", value):  # Rust would print a panic
            raise InputError(
                f"the environment variable {name} is {value!r}, expected a URL such as http://127.0.0.1:9000: correct"
                " it, or unset it"
            )
    with convert_lance_errors(uri):
        return lancedb.connect(uri, read_consistency_interval=timedelta(0))


def sql_text(text: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _whole(where: str) -> str:
    """Return a condition in parentheses, in which LanceDB does not ignore what follows it, such as ``; x``."""
    return f"({where}\n)"


@contextmanager
def convert_lance_errors(uri: str, where: str | None = None, library: Library | None = None) -> Iterator[None]:
    """Convert exceptions of LanceDB to :class:`LibraryError`, or to an InputError about the condition, of one line.

    Args:
        uri: the library.
        where: the condition that was given by the user, if there is one.
        library: the library, whose columns an error about the condition names.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # LanceDB's panics are exceptions of a class that cannot be imported.
        if not isinstance(error, ValueError | RuntimeError | OSError) and type(error).__name__ != "RustPanic":
            raise
        reason = _reason(error)
        # "filter expression": one that fails for the value of a row, such as a division by zero.
        is_condition = isinstance(error, ValueError) or "filter expression" in reason
        if where is not None and library is not None and is_condition:
            columns = ", ".join(f"{name} ({kind})" for name, kind in library.columns.items()) or "none"
            raise InputError(
                f"the condition {where[:300]!r} cannot be used ({reason[:300]}), expected SQL such as year >= 2020 AND"
                f" place = 'Rome' on the columns of the library: {columns}"
            ) from error
        advice = "check its path and permissions, and that the disk is not full; or make it again"
        if is_url(uri):
            advice = (
                "check that the bucket exists, and the credentials, region and endpoint in the environment"
                " (docs/search.md)"
            )
        raise LibraryError(f"the library {uri} cannot be read or written ({reason}): {advice}") from error


def _reason(error: Exception) -> str:
    """Return the reason of an error of LanceDB in one line, without the names of LanceDB's source files.

    The message of a failed request to object storage has the errors of several libraries, often as Rust prints them for
    debugging. Only the innermost one says what happened.
    """
    text = " ".join(re.split(r",? /\S+\.rs:\d+|, location: ", str(error))[0].split()) or type(error).__name__
    if found := re.search("<Message>(.*?)</Message>", text):  # the words of the object storage
        return found[1]
    request = re.search(r"(?:uri: Some\(|Error performing \w+ )(\w+://[^/ )]+).*(?:inner: | - )(.*)", text)
    if not request:
        return text.removeprefix("Invalid input, ")
    server, reason = request.groups()
    if status := re.search(r"status(?: code)?: (\d+)", reason):
        reason = f"HTTP status {status[1]}"
    elif "}" in reason:
        reason = [*re.findall(r"[A-Z]\w+", reason), *re.findall(r'"([^"\\]+)"', reason)][-1]
    return f"{server}: {reason}"
