"""What a search finds, and what a library refuses."""

import io
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lancedb
import numpy as np
import pyarrow
import pytest
from PIL import Image

from blip2.errors import InputError
from blip2.pipelines import load
from blip2.search import library as library_module
from blip2.search.indexing import index, optimize
from blip2.search.library import Library, LibraryError, exact_similarity, to_stored
from blip2.search.recall import measure_recall
from conftest import draw
from fixtures.library import draw_photos


@pytest.fixture
def library(pipeline, photos, tmp_path):
    """A library that a test may change; otherwise it uses ``shared``."""
    index(pipeline, str(photos), tmp_path / "library")
    return Library.open(tmp_path / "library", pipeline)


@pytest.fixture(scope="module")
def shared(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    index(pipeline, str(draw_photos(folder / "photos")), folder / "library")
    return Library.open(folder / "library", pipeline)


@pytest.fixture(scope="module")
def images(shared):
    """The folder of the images of ``shared``."""
    return Path(shared.uri).parent / "photos"


# -- results -------------------------------------------------------------------------------------------------------


def test_words_are_ranked_as_the_pipeline_ranks_them(pipeline, images, shared):
    library, paths = shared, sorted(map(str, images.iterdir()))
    similarity = pipeline.similarity(paths, "a red disc")[:, 0]
    match = pipeline.match(paths, "a red disc")[:, 0]
    hits = library.search("a red disc", k=12, rerank_k=0)
    assert [hit.match for hit in hits] == [None] * 12
    for hit in hits:
        assert hit.similarity == pytest.approx(similarity[paths.index(hit.image)].item(), abs=2e-3)
    assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    best = library.search("a red disc", k=12, rerank_k=5)
    assert {hit.image for hit in best[:5]} == {hit.image for hit in hits[:5]}
    assert [hit.match is None for hit in best] == [False] * 5 + [True] * 7
    score = match.logit() + similarity / pipeline.model.temperature
    order = [score[paths.index(hit.image)].item() for hit in best[:5]]
    assert order == sorted(order, reverse=True) and len({f"{each:.6f}" for each in order}) == 5
    for hit in best[:5]:
        assert hit.match == pytest.approx(match[paths.index(hit.image)].item(), abs=1e-5)
    # The best of all twelve is first, even if only one is asked for.
    assert library.search("a red disc", k=1, rerank_k=12)[0].image == paths[int(score.argmax())]


def test_an_image_finds_itself(images, shared):
    query = images / "green-stripe.png"
    for form in (query, query.read_bytes(), Image.open(query), np.asarray(Image.open(query))):
        first, second, *_ = shared.search(form)
        assert first.image == str(query) and first.similarity == pytest.approx(1, abs=2e-3)
        assert second.similarity < first.similarity and first.match is None


def test_images_with_the_same_bytes_are_one_hit(pipeline, photos, tmp_path):
    for number in range(5):
        (photos / f"copy-{number}.png").write_bytes((photos / "red-disc.png").read_bytes())
    report = index(pipeline, str(photos), tmp_path / "library")
    assert (report.added, report.embedded, report.duplicates) == (17, 12, 5)
    library = Library.open(tmp_path / "library", pipeline)
    hits = library.search(photos / "red-disc.png", k=12)
    assert len(hits) == 12 and len({hit.digest for hit in hits}) == 12
    found = {hits[0].image, *hits[0].duplicates}
    assert found == {str(photos / f"{name}.png") for name in ("red-disc", *(f"copy-{n}" for n in range(5)))}
    assert len(library.search(photos / "red-disc.png", k=2)) == 2


def test_the_mean_is_rescored_exactly(pipeline, images, shared, tmp_path):
    index(pipeline, str(images), tmp_path / "means", vectors="1")
    means = Library.open(tmp_path / "means", pipeline)
    stored = means.table.to_arrow()["mean"].type
    assert stored == pyarrow.list_(pyarrow.float16(), 16)
    for rerank_k in (3, 12):
        expected = shared.search("a blue square", k=12, rerank_k=rerank_k)
        found = means.search("a blue square", k=12, rerank_k=rerank_k)
        assert [hit.image for hit in found] == [hit.image for hit in expected]
        assert [hit.similarity for hit in found] == pytest.approx([hit.similarity for hit in expected], abs=2e-3)
        assert [hit.match for hit in found[:3]] == pytest.approx([hit.match for hit in expected[:3]], abs=1e-5)
    embedded = pipeline.embed_images([hit.image for hit in expected]).numpy()
    query = pipeline.embed_texts("a blue square").numpy()
    plain = {hit.image: hit.similarity for hit in means.search("a blue square", k=12, rerank_k=0)}
    mean = embedded.mean(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert [plain[hit.image] for hit in expected] == pytest.approx((mean @ query[0]).tolist(), abs=2e-3)
    with pytest.raises(InputError, match="was made with --vectors 1, not all: leave it out"):
        index(pipeline, str(images), tmp_path / "means", vectors="all")


@pytest.mark.parametrize("vectors", ["all", "1"])
def test_a_long_shortlist_is_read_in_parts(pipeline, photos, tmp_path, monkeypatch, vectors):
    index(pipeline, str(photos), tmp_path / "library", vectors=vectors)
    (photos / "red-square.png").unlink()
    library = Library.open(tmp_path / "library", pipeline)
    queries = ("a disc", photos / "red-disc.png")
    expected = [library.search(query, k=12, rerank_k=7) for query in queries]
    sizes = []
    encode = pipeline.encode_pixels
    monkeypatch.setattr(pipeline, "encode_pixels", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(pipeline, "batch_size", 5)
    for query, hits in zip(queries, expected, strict=True):
        found = library.search(query, k=12, rerank_k=7)
        assert [hit.image for hit in found] == [hit.image for hit in hits]
        assert [hit.problem for hit in found] == [hit.problem for hit in hits]
        assert [hit.similarity for hit in found] == pytest.approx([hit.similarity for hit in hits], abs=1e-5)
        for one, other in zip(found, hits, strict=True):
            assert one.match == (None if other.match is None else pytest.approx(other.match, abs=1e-5))
    assert max(sizes) <= 5 and len(sizes) > 2


def test_an_image_that_changed_is_not_reranked(photos, library):
    draw("disc", "red", 90).save(photos / "red-disc.png")
    (photos / "red-square.png").unlink()
    hits = {hit.image: hit for hit in library.search("a disc", k=12, rerank_k=12)}
    assert sum(hit.match is None for hit in hits.values()) == 2
    assert "has changed since it was indexed: run blip2 index again" in hits[str(photos / "red-disc.png")].problem
    assert "cannot be read" in hits[str(photos / "red-square.png")].problem


def test_every_search_reads_the_newest_state(pipeline, photos, library, tmp_path):
    draw("disc", "red", 90).save(photos / "new.png")
    index(pipeline, str(photos), tmp_path / "library")
    assert len(library) == 13
    assert library.search(photos / "new.png", k=1)[0].image == str(photos / "new.png")


def test_the_table_is_an_ordinary_one(shared):
    table = lancedb.connect(shared.uri).open_table("images")
    arrow = table.to_arrow()
    assert arrow.schema.field("vectors").type == pyarrow.list_(pyarrow.list_(pyarrow.float16(), 16))
    assert len(arrow) == 12 and len(arrow["vectors"][0]) == 4
    assert json.loads(arrow.schema.metadata[b"blip2"])["num_query_tokens"] == 4
    assert len(Library.open(f"file://{shared.uri}")) == 12


# -- filters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dated(pipeline, tmp_path_factory):
    """Images with years and places."""
    folder = tmp_path_factory.mktemp("dated")
    photos = draw_photos(folder / "photos")
    table = photos / "images.jsonl"
    names = sorted(path.name for path in photos.glob("*.png"))
    rows = [
        {"image": name, "caption": f"image {n}", "year": 2000 + n, "place": "Rome" if n % 2 else "O'Hare", "id": n / 2}
        for n, name in enumerate(names)
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index(pipeline, str(table), folder / "library")
    return Library.open(folder / "library", pipeline)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("year >= 2010", {2010, 2011}),
        ("place = 'Rome' AND year < 2004", {2001, 2003}),
        ("place = 'O''Hare' AND year IN (2000, 2001, 2002)", {2000, 2002}),
        ("id = 2.5", {2005}),
        ("year = 1900", set()),
        ("array_has(captions, 'image 7')", {2007}),
        ("year = 2003 OR place = 'a;b' -- one", {2003}),
    ],
)
def test_a_condition_on_the_metadata(dated, where, expected):
    assert {hit.metadata["year"] for hit in dated.search("a disc", where=where)} == expected


def test_columns_and_captions(dated):
    assert dated.columns == {"year": "int64", "place": "string", "id": "double"}
    (hit,) = dated.search("a disc", where="year = 2003")
    assert hit.captions == ("image 3",) and hit.metadata == {"year": 2003, "place": "Rome", "id": 1.5}
    assert hit.as_json()["captions"] == ["image 3"] and json.dumps(hit.as_json())


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("yeer = 2000", "No field named"),
        ("year ===", "expected SQL such as year >= 2020"),
        ("year = 'late'", r"year \(int64\), place \(string\), id \(double\)"),
        ("year", "does not return a boolean"),
        ("", "expected SQL"),
        ("digest = x'zz", "expected SQL"),
        ("year % 0 = 1", "Divide by zero"),
        ("true; DROP TABLE images", "found: ;"),  # what follows a condition would be ignored
        ("year > 2000 LIMIT 1", "found: LIMIT"),
        ("year > 2000, place = 'Rome'", "expected SQL"),
    ],
)
def test_a_condition_that_is_none(dated, where, expected):
    with pytest.raises(InputError, match=expected) as raised:
        dated.search("a disc", where=where)
    assert "\n" not in str(raised.value) and ".rs" not in str(raised.value)


def test_a_long_condition_is_not_repeated(dated):
    with pytest.raises(InputError, match="cannot be used") as raised:
        dated.search("a disc", where="year = 'late' OR " * 1000 + "true")
    assert len(str(raised.value)) < 1000


# -- the index -----------------------------------------------------------------------------------------------------


def fill(library, vectors, digests=None, first=0):
    """Write rows as an index run does, with given vectors [N, Q, C], each of another image if there are no digests."""
    schema, numbers = library.table.schema, range(first, first + len(vectors))
    cells = {"source": ["s"] * len(vectors), "image": [f"{n}" for n in numbers]}
    cells["digest"] = digests or [f"{n:032}" for n in numbers]
    cells |= {"captions": [[]] * len(vectors), library_module.VECTORS: to_stored(vectors, library.config)}
    columns = [cells.get(each.name, [None] * len(vectors)) for each in schema]
    library.table.add(pyarrow.Table.from_arrays([pyarrow.array(c, f.type) for c, f in zip(columns, schema)], schema=schema))  # noqa: B905, E501  # fmt: skip


@pytest.mark.parametrize("spread", [0.02, 10.0], ids=["near-identical", "diverse"])
def test_the_index_finds_what_exact_search_finds(tmp_path, monkeypatch, spread):
    """Whether the queries of an image are nearly identical, where LanceDB finds a few images several times, or not."""
    monkeypatch.setattr(library_module, "EXACT_ROWS", 500)
    monkeypatch.setattr("blip2.search.indexing.EXACT_ROWS", 500)
    config = library_module.LibraryConfig("none", "none", "all", 4, 64)
    table = library_module.connect(str(tmp_path)).create_table("images", schema=library_module.library_schema(config))
    library = Library(str(tmp_path), table)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 1, 64)) + spread * rng.normal(size=(2000, 4, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    fill(library, vectors)
    optimize(library)
    assert [each.index_type for each in library.table.list_indices()] == ["IvfRq"]
    queries = rng.normal(size=(20, 64)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    report = measure_recall(library, queries=queries)
    assert (report.rows, report.has_index, report.queries) == (2000, True, 20)
    assert report.recall >= 0.95
    exact = exact_similarity(queries[:1], vectors)
    hits = library.find_similar(queries[:1], 10)
    assert len(hits) == 10
    assert [hit.similarity for hit in hits] == pytest.approx([exact[int(hit.image)] for hit in hits], abs=2e-3)
    assert len(library.find_similar(queries[:1], 600)) == 600
    assert measure_recall(library, k=10, num_queries=5).recall == 1


def test_when_the_index_is_built_anew(tmp_path, monkeypatch):
    """A few images that are added or deleted leave the index as it is, and are found or gone all the same."""
    monkeypatch.setattr(library_module, "EXACT_ROWS", 300)
    monkeypatch.setattr("blip2.search.indexing.EXACT_ROWS", 300)
    monkeypatch.setattr("blip2.search.indexing.MAX_SMALL_FILES", 4)
    config = library_module.LibraryConfig("none", "none", "all", 2, 32)
    table = library_module.connect(str(tmp_path)).create_table("images", schema=library_module.library_schema(config))
    library, rng = Library(str(tmp_path), table), np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 2, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)

    def add(start, end):
        fill(library, vectors[start:end], first=start)

    def rows():
        """Optimize, and return the numbers of rows inside and outside of the index, if there is one."""
        optimize(library)
        stats = [table.index_stats(each.name) for each in table.list_indices()]
        return [(each.num_indexed_rows, each.num_unindexed_rows) for each in stats]

    def find(number):
        return library.find_similar(vectors[number, :1], 1)[0].image == f"{number}"

    add(0, 300)
    assert rows() == [] and find(5)
    add(300, 1000)
    assert rows() == [(1000, 0)] and find(5)
    add(1000, 1300)
    assert rows() == [(1000, 300)] and find(1200) and find(5)
    table.delete("image = '1200'")
    table.delete("image = '5'")
    assert not find(1200) and not find(5)
    add(1300, 1302)
    assert rows() == [(1300, 0)] and find(1301) and find(6) and not find(5)
    for number in range(4):
        add(1302 + number, 1303 + number)
    assert rows() == [(1304, 0)] and find(1305)
    table.delete("CAST(image AS INT) < 200")
    assert rows() == [(1105, 0)] and find(1305) and not find(7)
    table.delete("CAST(image AS INT) BETWEEN 200 AND 501")
    assert rows() == [(803, 0)]
    table.delete("CAST(image AS INT) < 1100")
    assert rows() == [] and find(1301) and not find(600)


def test_recall_counts_images_with_the_same_bytes_once(tmp_path):
    """Of 60 images there are nine copies each, of 30 one."""
    config = library_module.LibraryConfig("none", "none", "all", 2, 8)
    table = library_module.connect(str(tmp_path)).create_table("images", schema=library_module.library_schema(config))
    library, rng = Library(str(tmp_path), table), np.random.default_rng(0)
    vectors = rng.normal(size=(90, 2, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    images = rng.permutation([*list(range(60)) * 9, *range(60, 90)])
    for part in np.split(images, [200]):
        fill(library, vectors[part], [f"{image:032}" for image in part])
    report = measure_recall(library, k=10, queries=vectors[:8, 0])
    assert (report.rows, report.recall) == (570, 1)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_another_model_is_refused(shared, other_run, images):
    other = load(other_run, "cpu")
    for refused in (
        lambda: Library.open(shared.uri, other),
        lambda: Library.open(shared.uri, other_run).search("a disc"),
        lambda: index(other, str(images), shared.uri),
    ):
        with pytest.raises(InputError, match="whose weights are not those of"):
            refused()


def test_a_library_that_is_made_anew(library, pipeline, other_run, photos):
    """An open library goes on with the same model, and is not searched with the vectors of another one."""
    shutil.rmtree(library.uri)
    index(pipeline, str(photos), library.uri)
    assert len(library.search("a disc", k=12)) == 12
    shutil.rmtree(library.uri)
    index(load(other_run, "cpu"), str(photos), library.uri)
    with pytest.raises(LibraryError, match="was made anew"):
        library.search("a disc")


def test_the_library_names_its_model(shared, run):
    assert shared.config.model == str(run / "checkpoints" / "step-00000001")
    assert len(Library.open(shared.uri, device="cpu").search("a disc", k=3)) == 3
    with pytest.raises(InputError, match="but nowhere cannot be loaded"):
        Library.open(shared.uri, "nowhere").search("a disc")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"query": " "}, "expected words"),
        ({"query": b"no image"}, "is not an image"),
        ({"query": "a", "k": 0}, "k is 0, expected a whole number from 1 to 10000"),
        ({"query": "a", "rerank_k": -1}, "rerank_k is -1"),
        ({"query": "a", "k": True}, "k is True"),
    ],
)
def test_a_search_that_cannot_be_done(shared, arguments, expected):
    with pytest.raises(InputError, match=expected):
        shared.search(**arguments)


def test_no_library(pipeline, tmp_path):
    with pytest.raises(InputError, match=r"there is no library in .*: check the path, or make one with blip2 index"):
        Library.open(tmp_path / "nowhere")
    lancedb.connect(tmp_path / "other").create_table("images", pyarrow.table({"a": [1]}))
    with pytest.raises(InputError, match="was not made by blip2 index"):
        Library.open(tmp_path / "other")
    Library.create(tmp_path / "empty", pipeline)
    with pytest.raises(InputError, match="already contains a library"):
        Library.create(tmp_path / "empty", pipeline)
    assert Library.open(tmp_path / "empty", pipeline).search("a disc") == []
    with pytest.raises(InputError, match="has no images: add some with blip2 index"):
        measure_recall(tmp_path / "empty")


def test_without_lancedb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(InputError, match=r"pip install 'blip2\[search\]'"):
        Library.open(tmp_path)


def test_a_damaged_library(library, tmp_path):
    for file in (tmp_path / "library" / "images.lance" / "data").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read or written") as raised:
        library.search("a disc")
    assert "\n" not in str(raised.value)


class Refusing(BaseHTTPRequestHandler):
    """Object storage that knows no key."""

    def do_GET(self):
        body = b"<?xml version='1.0'?>\n<Error><Code>InvalidKey</Code><Message>The key is unknown.</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("name", "value"), [("ENDPOINT", "127.0.0.1:9000"), ("ENDPOINT_URL", ""), ("ENDPOINT_URL_S3", "http://a b")]
)
def test_an_endpoint_that_is_no_url(monkeypatch, capfd, name, value):
    monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(InputError, match=f"AWS_{name} is '{value}', expected a URL"):
        Library.open("s3://photos/library")
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("is_there", [True, False])
def test_object_storage_that_does_not_answer_or_refuses(monkeypatch, is_there):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"ENDPOINT": url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    if is_there:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    else:
        server.server_close()
    with pytest.raises(InputError) as raised:
        Library.open("s3://photos/library")
    reason = "The key is unknown." if is_there else f"{url}: Connection refused"
    assert str(raised.value) == (
        f"the library s3://photos/library cannot be read or written ({reason}): check that the bucket exists, and the"
        " credentials, region and endpoint in the environment (docs/search.md)"
    )
    assert "RetryError" in str(raised.value.__cause__)
    if is_there:
        server.shutdown()
        server.server_close()


DEBUG = (
    'Invalid input, Failed to connect to namespace: IO {{ source: Generic {{ store: "S3", source: ListRequest {{'
    " source: RetryError(RetryErrorImpl {{ method: GET, uri: Some(http://storage:9000/photos?prefix=lib), retries: 3,"
    ' inner: {} }}) }} }}, location: Location {{ file: "/lance-io/src/object_store.rs", line: 1506 }} }}'
)
DISPLAY = (
    "lance error: LanceError(IO): Generic S3 error: Error performing list request: Error performing GET"
    " http://storage:9000/photos?prefix=lib%2F in 377.3ms, after 3 retries  - {}, /lance-io/src/io.rs:15:9"
)
DNS = (
    'Http(HttpError { kind: Connect, source: Error(Connect, ConnectError("dns error", Custom { kind: Uncategorized,'
    ' error: "Name or service not known" })) })'
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (DEBUG.format(DNS), "http://storage:9000: Name or service not known"),
        (DEBUG.format('Status { status: 503, body: Some("") }'), "http://storage:9000: HTTP status 503"),
        (DEBUG.format("BareRedirect"), "http://storage:9000: BareRedirect"),
        (DISPLAY.format("HTTP error: error sending request"), "http://storage:9000: HTTP error: error sending request"),
        (
            DISPLAY.format("Server returned non-2xx status code: 403 Forbidden: "),
            "http://storage:9000: HTTP status 403",
        ),
        ("Invalid input, No object store for scheme: 'xyz'\nValid: s3", "No object store for scheme: 'xyz' Valid: s3"),
    ],
)
def test_the_reason_of_a_failed_request(message, expected):
    """Messages of LanceDB, abridged."""
    with pytest.raises(InputError) as raised, library_module.convert_lance_errors("s3://photos/library"):
        raise RuntimeError(message)
    assert f"cannot be read or written ({expected}): check that the bucket exists" in str(raised.value)


def test_delete(library, photos):
    with pytest.raises(InputError, match="found: ;"):
        library.delete("true; and nothing else")
    assert library.delete(f"image = '{photos}/red-disc.png'") == 1
    assert len(library) == 11


def test_bytes_of_an_image(shared):
    (hit,) = shared.search("a disc", k=1)
    data = shared.read_image(hit)
    assert Image.open(io.BytesIO(data)).size == (40, 40)
