"""Whatever a client sends is answered with an error of the client in OpenAI's shape, and costs little.

``BAD_REQUESTS=5000`` tries so many examples of each operation instead of a few.
"""

import asyncio
import copy
import gc
import json
import os
import re
import socket
import time
from contextlib import suppress

import httpx2
import hypothesis
import psutil
import pytest
import schemathesis
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as more_checks
from starlette.responses import Response

from blip2.search.indexing import index
from blip2.search.library import Library
from blip2.serve import gate, protocol
from blip2.serve.app import create_app
from blip2.serve.metrics import Metrics
from blip2.serve.options import ServeOptions
from conftest import draw
from fixtures.bad_images import LOCAL_HOSTS, SVG, bad_images
from fixtures.library import draw_photos
from fixtures.service import build_writer, data_url, serve

EXAMPLES = int(os.environ.get("BAD_REQUESTS", "4"))
URL = data_url(draw("disc", "red", 0))
MAX_BODY = 4 << 20
SECONDS = 1.0
"""After which slow clients are left in these tests."""
CHAT, EMBEDDINGS, RERANK, SEARCH, ATTENTION, EXPLAIN = (
    f"/v1/{name}" for name in ("chat/completions", "embeddings", "rerank", "search", "attention", "explain")
)
IMAGE_PART = {"type": "image_url", "image_url": {"url": URL}}
GOOD = {
    CHAT: {
        "model": "writer",
        "messages": [{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "what?"}]}],
        "max_tokens": 1,
    },
    EMBEDDINGS: {"model": "reader", "input": "a red disc"},
    RERANK: {"model": "reader", "query": "red", "documents": [{"image": URL}]},
    SEARCH: {"query": "red", "top_k": 2},
    ATTENTION: {"model": "reader", "image": URL, "text": "red"},
    EXPLAIN: {
        "model": "writer",
        "messages": [{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "what?"}]}],
        "token_ids": [1, 2],
    },
}
"""A request of each endpoint that is answered; the bad ones differ from it in one place."""


@pytest.fixture(scope="module")
def service(parts, pipeline, tmp_path_factory):
    """The port of a service with one image host, whose address is not allowed, and impatient with slow clients."""
    folder = tmp_path_factory.mktemp("secret-folder")
    index(pipeline, str(draw_photos(folder / "photos")), folder / "library")
    options = ServeOptions(
        max_body_bytes=MAX_BODY, max_images=4, max_tokens=64, deadline=20.0, allow_image_host=["localhost"]
    )
    library = Library.open(folder / "library", pipeline)
    app = create_app({"reader": pipeline, "writer": build_writer(parts)}, library, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "HEADER_SECONDS", SECONDS)
        patch.setattr(protocol, "WRITE_SECONDS", SECONDS)
        patch.setattr(gate, "BODY_SECONDS", SECONDS)
        with serve(app) as port:
            yield port


@pytest.fixture(scope="module")
def client(service):
    with httpx2.Client(base_url=f"http://127.0.0.1:{service}", timeout=60, trust_env=False) as client:
        yield client


class Raw(str):
    """A piece of JSON as it is sent."""


def to_json(value):
    """JSON as lenient clients write it: with NaN, lone surrogates, and :class:`Raw` pieces."""
    raw = []

    def default(value):
        raise TypeError(value)

    def mark(value):
        if isinstance(value, Raw):
            raw.append(value)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: mark(each) for key, each in value.items()}
        return [mark(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(mark(value), default=default)
    for number, piece in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', piece)
    return text.encode()


LEAKS = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/home|/root|/tmp|/usr|/work|secret-folder|0x[0-9a-f]{6}|Errno|root:x"
    r"|blip2\.|torch|pydantic|uvicorn|starlette|openai\.com"
)


def problem(status, content_type, body):
    """What is wrong with the answer to a bad request; None if nothing is."""
    if not 400 <= status < 500:
        return f"status {status}: {body[:300]!r}"
    if not content_type.startswith("application/json"):
        return f"{status} of type {content_type}: {body[:300]!r}"
    answer = json.loads(body)
    error = answer.get("error")
    if set(answer) != {"error"} or set(error) != {"message", "type", "param", "code"}:
        return f"shape {answer}"
    if not isinstance(error["message"], str) or not error["message"] or not isinstance(error["type"], str):
        return f"message {error}"
    if not all(error[key] is None or isinstance(error[key], str) for key in ("param", "code")):
        return f"param or code {error}"
    if len(body) > 2000 or "\n" in error["message"]:
        return f"{len(body)} bytes: {body[:300]!r}"
    return f"a leak: {error}" if LEAKS.search(error["message"]) else None


def send(client, cases):
    """Send (name, path, body), and check the answers."""
    found = []
    for name, path, body in cases:
        content = body if isinstance(body, bytes) else to_json(body)
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        if wrong := problem(answer.status_code, answer.headers.get("content-type", ""), answer.content):
            found.append(f"{path} {name}: {wrong}")
    assert not found, "\n".join(found)


def check_alive(client):
    for path, body in GOOD.items():
        answer = client.post(path, json=body)
        assert answer.status_code == 200, (path, answer.text[:300])


def changed(path, where, value):
    """The good request of an endpoint with another value in one place; ``...`` removes it."""
    body = copy.deepcopy(GOOD[path])
    *parents, last = where
    inner = body
    for each in parents:
        inner = inner[each] if isinstance(inner, list) else inner.setdefault(each, {})
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return body


# -- fields ------------------------------------------------------------------------------------------------------------

NESTED = Raw("[" * 50_000 + "]" * 50_000)
TEXT = [0, 1.5, True, [], {}, ["a"], {"a": 1}, NESTED]
NUMBER = ["1", "NaN", [], {}, Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-1e999"), 10**400]
INTEGER = [*NUMBER, 1.5, True, Raw("1" * 5000), -1]
FLAG = ["true", 2, [], {}, Raw("NaN")]
UNKNOWN = ["", "none", "../../etc/passwd", "/etc/passwd", "reader/../writer", "\0", "\ud800", "x" * 100_000, "\x1b[2J"]
BLANK = ["", " ", "\n\t"]
LONG = ["word " * 10_000]
"""A prompt of 10,000 tokens and more, for which no tiny model has room."""
MESSAGE = ("messages", 0)
FIELDS = {
    CHAT: {
        ("model",): [..., None, *TEXT, *UNKNOWN, "reader"],
        ("messages",): [..., None, 1, "hello", {}, [], [[]], [None], ["hello"], [{}], NESTED],
        (*MESSAGE, "role"): [..., None, *TEXT, "", "User", "tool", "function", "assistant", "x" * 10_000],
        (*MESSAGE, "content"): [..., None, 0, True, {}, [], [None], [[]], ["what?"], [{}], *BLANK, *LONG],
        (*MESSAGE, "content", 0, "type"): [..., None, *TEXT, "", "text", "input_audio", "file", "image"],
        (*MESSAGE, "content", 0, "image_url"): [..., None, *TEXT, URL],
        (*MESSAGE, "content", 0, "image_url", "url"): [..., None, *TEXT],
        (*MESSAGE, "content", 0, "image_url", "detail"): [*TEXT, "best"],
        (*MESSAGE, "content", 1, "text"): [..., None, *TEXT, *LONG],
        (*MESSAGE, "content", 1): [None, 0, "what?", [], {}, {"type": "text"}],
        (*MESSAGE, "tool_calls"): [[], [{"id": "1"}]],
        ("temperature",): [*NUMBER, -0.1, -1e-9, 2.1, 1e300],
        ("top_p",): [*NUMBER, 0, -1, 1.1],
        ("n",): [*INTEGER, 0, 17, 10**9],
        ("max_tokens",): [*INTEGER, 0, 65, 10**9],
        ("max_completion_tokens",): [*INTEGER, 0, 1, 65, 10**9],
        ("seed",): [*NUMBER, 1.5, 2**63, -(2**63) - 1],
        ("stop",): [0, {}, "", [""], ["a"] * 5, [0], [[]], "x" * 200_000],
        ("stream",): FLAG,
        ("stream_options",): [0, "x", [], {"include_usage": "yes"}, {"other": True}],
        ("logprobs",): [*FLAG, 5],
        ("top_logprobs",): [*INTEGER, 21, 3],
        ("return_token_ids",): FLAG,
        ("frequency_penalty",): [*NUMBER, 0.5, -2],
        ("presence_penalty",): [*NUMBER, 0.5, -2],
        ("logit_bias",): [{"1": 100}, {"x": "y"}],
        ("tools",): [[{"type": "function"}], "x"],
        ("functions",): [[{"name": "f"}]],
        ("user",): [0, [], {}],
        ("response_format",): [
            *(0, "json", [], {}, {"type": "json_object"}, {"type": "xml"}, {"type": "json_schema"}),
            *({"type": "json_schema", "json_schema": each} for each in ({}, {"name": "x"}, [], "x", 0)),
            *(
                {"type": "json_schema", "json_schema": {"name": "x", "schema": each}}
                for each in (
                    *({}, {"enum": []}, {"enum": [1]}, {"enum": ["a", "a"]}, {"enum": [" "]}, {"enum": "abc"}, [], "x"),
                    *(
                        {"type": "object"},
                        {"type": "object", "properties": {"a": {}, "b": {}}},
                        {"$ref": "file:///etc"},
                    ),
                    {"type": "object", "properties": {"a": []}},
                    {"enum": [str(number) for number in range(2000)]},
                    {"enum": ["word " * 10_000]},
                    {"enum": ["\ud800"]},
                    {"type": "object", "properties": {"\ud800": {"enum": ["a", "b"]}}},
                )
            ),
        ],
        ("__class__",): ["x"],
    },
    EMBEDDINGS: {
        ("model",): [..., None, *TEXT, *UNKNOWN, "writer"],
        ("input",): [
            ...,
            None,
            0,
            True,
            {},
            [],
            [[]],
            [None],
            [0],
            [[1, 2]],
            [{}],
            *BLANK,
            [""],
            ["a", " "],
            *LONG,
            NESTED,
        ],
        ("encoding_format",): [0, "", "hex", [], {}],
        ("dimensions",): [0, 8, "8"],
        ("multivector",): FLAG,
        ("user",): [0, []],
    },
    RERANK: {
        ("model",): [..., None, *TEXT, *UNKNOWN, "writer"],
        ("query",): [..., None, 0, [], {}, *BLANK, {"text": 0}, {"image": 0}, {"text": "a", "image": URL}, *LONG],
        ("documents",): [..., None, 0, "a", {}, [], [None], [0], [""], ["text"], [{}], [{"image": URL}] * 1001, NESTED],
        ("top_n",): ["1", 1.5, True, [], {}, Raw("NaN"), Raw("1e999"), Raw("1" * 5000), -1, 0],
        ("return_documents",): FLAG,
    },
    SEARCH: {
        ("query",): [..., None, 0, True, [], {}, *BLANK, {"text": ""}, {"image": ""}, {"sql": "1"}, *LONG],
        ("top_k",): [*INTEGER, 0, 101, 10**12],
        ("rerank_k",): [*INTEGER, 101],
        ("filter",): [
            *(0, "1 = 1", [], {"none": 1}, {"digest": {}}, {"source": []}, {"source": {"like": "%"}}, {"`": 1}),
            *(
                {"source` = '' OR `source": "x"},
                {"vector": 1},
                {"source": None},
                {"source": [[]]},
                {"source": {"eq": []}},
                {"\ud800": 1},
                {"source": ["x"] * 1001},
            ),
        ],
        ("where",): ["1 = 1"],
    },
    ATTENTION: {
        ("model",): [..., None, *TEXT, *UNKNOWN],
        ("image",): [..., None, *TEXT],
        ("text",): [0, True, [], {}, *BLANK, *LONG],
    },
    EXPLAIN: {
        ("model",): [..., None, *TEXT, *UNKNOWN, "reader"],
        ("messages",): [..., None, 1, "hello", {}, [], [[]], [None], [{}]],
        (*MESSAGE, "content"): ["what?", [IMAGE_PART, IMAGE_PART], [{"type": "text", "text": "what?"}]],
        ("token_ids",): [
            *(..., None, 0, "a", "1", {}, [], [None], ["1"], [1.5], [True], [[1]], [-1], [10**9], [10**30]),
            *([1] * 65, [1] * 100_000, NESTED),
        ],
        ("text",): ["a disc"],
    },
}
FIELDS_BY_NAME = [
    (f"{'.'.join(map(str, where))} = {str(value)[:40]!r}", path, changed(path, where, value))
    for path, fields in FIELDS.items()
    for where, values in fields.items()
    for value in values
]


def test_wrong_fields(client):
    check_alive(client)
    assert len(FIELDS_BY_NAME) >= 400
    send(client, FIELDS_BY_NAME)
    check_alive(client)


# -- images ------------------------------------------------------------------------------------------------------------


def image_cases(endpoints=2):
    """Each bad image at so many of the endpoints, which take turns."""
    for number, (name, url) in enumerate(bad_images().items()):
        everywhere = [
            (name, CHAT, changed(CHAT, (*MESSAGE, "content", 0, "image_url", "url"), url)),
            (name, EMBEDDINGS, {"model": "reader", "input": [{"image": url}, "a"]}),
            (name, RERANK, {"model": "reader", "query": "a", "documents": [{"image": URL}, {"image": url}]}),
            (name, SEARCH, {"query": {"image": url}}),
            (name, ATTENTION, {"model": "reader", "image": url}),
            (name, EXPLAIN, changed(EXPLAIN, (*MESSAGE, "content", 0, "image_url", "url"), url)),
        ]
        yield from (everywhere[(number + each) % len(everywhere)] for each in range(endpoints))


def test_bad_images(client):
    cases = list(image_cases())
    assert len(cases) >= 200
    send(client, cases)
    check_alive(client)


def test_an_allowed_host_on_a_private_address_is_not_asked(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        hosts = [host for host in LOCAL_HOSTS.split() if ":" not in host]
        urls = [f"http://{host}:{port}/" for host in hosts] + ["http://localhost/", "https://localhost/"]
        cases = [(url, ATTENTION, {"model": "reader", "image": url}) for url in urls]
        send(client, cases)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has connected
            listener.accept()


def test_too_many_images_and_messages(client):
    message = GOOD[CHAT]["messages"][0]
    many = [
        ("images", CHAT, changed(CHAT, (*MESSAGE, "content"), [IMAGE_PART] * 5 + [{"type": "text", "text": "a"}])),
        ("turns", CHAT, changed(CHAT, ("messages",), [message] * 2000)),
        ("two of the user", CHAT, changed(CHAT, ("messages",), [message] * 2)),
        ("documents", RERANK, {"model": "reader", "query": "a", "documents": [{"image": URL}] * 5}),
        ("inputs", EMBEDDINGS, {"model": "reader", "input": ["a"] * 3000}),
    ]
    send(client, many)


# -- bodies ------------------------------------------------------------------------------------------------------------

BODIES = {
    "nothing": b"",
    "not JSON": b"hello",
    "half JSON": b'{"model": "reader"',
    "a comma too many": b'{"model": "reader",}',
    "two values": b"{}{}",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"x"',
    "a number": b"1e999",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "reader"}'.encode("utf-16"),
    "a null byte": b"\0" * 100,
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a long number": b'{"model": ' + b"1" * 100_000 + b"}",
    "many keys": json.dumps({str(number): 0 for number in range(50_000)}).encode(),
    "the same key twice": b'{"model": "reader", "model": 0, "input": 0, "query": 0, "messages": 0, "image": 0}',
    "XML with entities": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>',
    "SVG": SVG,
    "a form": b"model=reader&input=a",
    "too large": b" " * (MAX_BODY + 1),
}


def test_bad_bodies(client):
    paths = list(GOOD)
    cases = [
        (name, paths[(number + each) % len(paths)], body)
        for number, (name, body) in enumerate(BODIES.items())
        for each in range(2)
    ]
    assert len(cases) >= 40
    send(client, cases)
    check_alive(client)


def test_what_two_readers_would_read_differently(client):
    """A key that occurs twice, of which JSON parsers take either; and a body with a coding that is not applied."""
    for path, body in GOOD.items():
        text = json.dumps(body)
        for twice in (text[:-1] + ", " + text[1:], text.replace('"text", ', '"text", "type": "text", ')):
            answer = client.post(path, content=twice, headers={"Content-Type": "application/json"})
            if twice != text:
                assert problem(answer.status_code, answer.headers["content-type"], answer.content) is None
                assert "occurs twice" in answer.json()["error"]["message"]
        answer = client.post(path, json=body, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 415
        assert problem(answer.status_code, answer.headers["content-type"], answer.content) is None


@pytest.mark.parametrize(
    ("path", "where", "value", "message"),
    [
        (CHAT, (*MESSAGE, "role"), "tool", "Input should be 'system'"),
        (CHAT, (*MESSAGE, "content"), 1, "Input should be a valid string"),
        (CHAT, (*MESSAGE, "content", 0, "image_url", "detail"), "best", "Input should be 'auto', 'low' or 'high'"),
        (CHAT, (*MESSAGE, "content", 0, "image_url"), URL, "Input should be a valid dictionary"),
        (CHAT, (*MESSAGE, "content", 1, "text"), ..., "Field required"),
        (CHAT, ("logit_bias",), {"1": 100}, "there is no such field here: leave it out"),
        (EMBEDDINGS, ("model",), ..., "Field required"),
        (EMBEDDINGS, ("input",), 1, "Input should be a valid string"),
        (RERANK, ("query", "text"), 0, "Input should be a valid string"),
        (SEARCH, ("filter", "year", "like"), "%", "there is no such field here: leave it out"),
    ],
)
def test_an_error_names_the_field(client, path, where, value, message):
    body = changed(path, where, value) if where[0] != "query" else {**GOOD[path], "query": {where[1]: value}}
    error = client.post(path, json=body).json()["error"]
    assert error["param"] == ".".join(map(str, where)) and message in error["message"]


def test_all_bodies_in_memory_are_bounded():
    """Eight bodies of the maximum size wait; the next request is asked to come again, and finds room afterwards."""
    release = asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        await release.wait()
        await Response()(scope, receive, send)

    around = gate.Gate(app, ServeOptions(max_body_bytes=1024), (), Metrics())

    async def call():
        parts, statuses = iter([{"type": "http.request", "body": bytes(1024)}]), []

        async def receive():
            return next(parts, None) or await asyncio.Event().wait()

        async def send(message):
            statuses.append(message.get("status"))

        await around({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send)
        return statuses[0]

    async def work():
        waiting = [asyncio.create_task(call()) for _ in range(gate.BODIES_IN_MEMORY)]
        await asyncio.sleep(0)
        assert await call() == 429
        release.set()
        assert await asyncio.gather(*waiting) == [200] * gate.BODIES_IN_MEMORY
        assert await call() == 200

    asyncio.run(work())


def test_bad_methods_paths_and_types(client):
    found = []

    def check(method, path, status=None, **options):
        answer = client.request(method, path, **options)
        wrong = problem(answer.status_code, answer.headers.get("content-type", ""), answer.content or b"{}")
        if method == "HEAD":
            wrong = None if 400 <= answer.status_code < 500 else f"status {answer.status_code}"
        if wrong or (status and answer.status_code != status):
            found.append(f"{method} {path}: {answer.status_code} {wrong}")

    for path in GOOD:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "PROPFIND"):
            check(method, path, 405)
        for kind in ("text/plain", "application/xml", "multipart/form-data; boundary=x", "image/png", "\xff"):
            check("POST", path, content=b"model=reader", headers={"Content-Type": kind.encode("latin-1")})
        check("POST", f"{path}/", 404, json=GOOD[path])  # no redirection, which would have the body sent elsewhere
        check("POST", path, content=b"\x1f\x8b\x08" + bytes(100), headers={"Content-Encoding": "gzip"})
    names = (
        "/v1",
        "/v1/",
        "/v2/models",
        "/v1/models/none",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/etc/passwd",
        "/.git/config",
    )
    for path in (
        *names,
        "/v1/completions",
        "/v1/files",
        "/docs",
        "/redoc",
        "/v1/models/%00",
        "/v1/models/" + "x" * 10_000,
    ):
        check("GET", path, 404)
    for path in (
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "....//app.py",
        "..%5capp.py",
        "%252e%252e/app.py",
        "none.js",
    ):
        check("GET", f"/static/{path}", 404)
        check("GET", f"/v1/search/images/{path}", 404)
    for path in (
        "/static/../../options.py",
        "//etc/passwd",
        "/static//etc/passwd",
        "/static/%00",
        "/static/index.html%00.js",
    ):
        check("GET", path, 404)
    assert not found, "\n".join(found)


# -- connections -------------------------------------------------------------------------------------------------------


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def request(body=b"", path=EMBEDDINGS, **headers):
    fields = {"Host": "x", "Content_Type": "application/json", "Content_Length": str(len(body)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{key.replace('_', '-')}: {value}" for key, value in fields.items() if value)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def receive(connection):
    """(status, type, body) of the answer; None if the connection is closed without one."""
    data = bytearray()
    with suppress(ConnectionError):
        while b"\r\n\r\n" not in data:
            part = connection.recv(1 << 16)
            if not part:
                return None
            data += part
            if data.startswith(b"HTTP/1.1 100"):
                data = data.partition(b"\r\n\r\n")[2]
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(body) < int(fields.get(b"content-length", 0)):
            if not (part := connection.recv(1 << 16)):
                return None
            body += part
        body = body[: int(fields.get(b"content-length", len(body)))]
        return int(head.split()[1]), fields.get(b"content-type", b"").decode(), body
    return None


RAW = {
    "not HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"POST /v1/embeddings HTTP/9.9\r\nHost: x\r\n\r\n",
    "no host": b"POST /v1/embeddings HTTP/1.1\r\n\r\n",
    "two hosts": b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "space in a name": b"POST /v1/embeddings HTTP/1.1\r\nHost : x\r\n\r\n",
    "null in a header": b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n",
    "a folded header": b"POST /v1/embeddings HTTP/1.1\r\n Host: x\r\n\r\n",
    "a header of 1 MB": b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nA: " + b"x" * (1 << 20) + b"\r\n\r\n",
    "100,000 headers": b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100_000 + b"\r\n",
    "a path of 1 MB": b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a negative length": request(Content_Length="-1"),
    "a length that is text": request(Content_Length="abc"),
    "a huge length": request(Content_Length="9" * 30),
    "two lengths": request(b"{}").replace(b"Content-Length: 2", b"Content-Length: 2\r\nContent-Length: 3"),
    "length and chunks": request(b"0\r\n\r\n", Transfer_Encoding="chunked"),
    "a bad chunk": request(b"zz\r\n{}\r\n", Transfer_Encoding="chunked", Content_Length=None),
    "a negative chunk": request(b"-1\r\n{}\r\n", Transfer_Encoding="chunked", Content_Length=None),
    "a huge chunk": request(b"f" * 40 + b"\r\n", Transfer_Encoding="chunked", Content_Length=None),
    "an unknown coding": request(b"", Transfer_Encoding="gzip, chunked", Content_Length=None),
    "100 MB declared": request(Content_Length=str(100 << 20)),
    "an upgrade": request(b"{}", Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Key="x"),
    "an expectation": request(b"{}", Expect="100-continue, other"),
    "a key that is not ASCII": request(b"{}", Authorization="Bearer \xff\xfe"),
    "forwarded addresses": request(b"{}", X_Forwarded_For="127.0.0.1", X_Forwarded_Host="x'\"<", Forwarded="for=_x"),
}


@pytest.mark.parametrize("name", RAW)
def test_bad_http(service, name):
    with connect(service) as connection:
        with suppress(ConnectionError):
            connection.sendall(RAW[name])
        answer = receive(connection)
    if answer is None:
        assert name in ("a header of 1 MB", "100,000 headers", "a path of 1 MB", "TLS")  # it may be closed at once
    else:
        assert problem(*answer) is None


def test_a_large_body_is_refused_before_it_has_arrived(service):
    block = b"x" * (1 << 16)
    for headers in ({"Content_Length": str(100 << 20)}, {"Content_Length": None, "Transfer_Encoding": "chunked"}):
        with connect(service) as connection:
            connection.sendall(request(**headers))
            sent = 0
            with suppress(ConnectionError):
                for _ in range((100 << 20) // len(block)):
                    connection.sendall(block if headers["Content_Length"] else b"10000\r\n" + block + b"\r\n")
                    sent += len(block)
                    connection.setblocking(False)
                    with suppress(BlockingIOError):
                        if connection.recv(1, socket.MSG_PEEK):
                            break
                    connection.settimeout(20)
            connection.settimeout(20)
            answer = receive(connection)
        assert sent < 50 << 20
        assert answer is None or (answer[0] == 413 and problem(*answer) is None)


def is_closed(connection):
    """Whether the server closes a connection, after it may have answered."""
    with suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return True


def test_clients_that_send_slowly_are_left(service, client):
    whole = request(json.dumps(GOOD[EMBEDDINGS]).encode())
    starts = [b"", b"P", whole[:30], whole[: whole.index(b"\r\n\r\n") + 2], whole[:-5], whole + whole[:10]]
    starts += [request(b"5\r\n{", Transfer_Encoding="chunked", Content_Length=None)]
    connections = [connect(service) for _ in starts]
    for connection, start in zip(connections, starts, strict=True):
        connection.sendall(start)
    check_alive(client)  # meanwhile others are answered
    for connection in connections:
        connection.settimeout(20)
        assert is_closed(connection)
        connection.close()
    drip = connect(service)
    drip.sendall(whole[:20])
    started = time.monotonic()
    with suppress(ConnectionError):
        while time.monotonic() - started < 20:
            drip.sendall(b"A")
            time.sleep(0.05)
    assert time.monotonic() - started < 20
    drip.close()


def test_a_body_that_drips_is_answered_in_time(service):
    with connect(service) as connection:
        connection.sendall(request(Content_Length="1000"))
        started = time.monotonic()
        connection.setblocking(False)
        answer = None
        while answer is None and time.monotonic() - started < 20:
            with suppress(ConnectionError):
                connection.send(b" ")
            time.sleep(0.05)
            with suppress(BlockingIOError):
                connection.recv(1, socket.MSG_PEEK)
                connection.settimeout(20)
                answer = receive(connection)
        assert answer is not None and answer[0] == 408 and problem(*answer) is None


def test_half_closed_and_reset_connections(service, client):
    whole = request(json.dumps(GOOD[CHAT]).encode(), CHAT)
    for cut in (1, 20, len(whole) // 2, len(whole)):
        with connect(service) as connection:
            connection.sendall(whole[:cut])
            connection.shutdown(socket.SHUT_WR)
            answer = receive(connection)
            assert answer is None or answer[0] == 200 or problem(*answer) is None
        with connect(service) as connection:  # with RST
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(whole[:cut])
    check_alive(client)


def wait_for_the_end(client):
    """Wait until no request is worked on."""
    end = time.monotonic() + 60
    while "\nblip2_requests_in_flight 0.0\n" not in (metrics := client.get("/metrics").text):
        assert time.monotonic() < end, metrics
        time.sleep(0.05)


def test_a_client_that_reads_nothing_is_left(service, client):
    body = {**GOOD[CHAT], "stream": True, "max_tokens": 64, "n": 16, "logprobs": True, "top_logprobs": 20}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", service))
        connection.sendall(request(json.dumps(body).encode(), CHAT))
        check_alive(client)
        wait_for_the_end(client)
    check_alive(client)


def test_memory_is_flat(service, client):
    """After requests of every kind, each of which takes up to a few MB, memory is what it was after the first."""
    heavy = [case for case in image_cases() if case[0].startswith(("bomb", "long", "parameters"))]
    heavy += [(name, EMBEDDINGS, BODIES[name]) for name in ("nested objects", "many keys", "too large")]
    process, sizes = psutil.Process(), []
    for _ in range(3):
        send(client, heavy)
        for start in (b"", b"POST", request(Content_Length="3000000", path=CHAT) + b" " * 2_000_000):
            with connect(service) as connection, suppress(ConnectionError):
                connection.sendall(start)
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 64 << 20, [size >> 20 for size in sizes]
    wait_for_the_end(client)
    check_alive(client)


# -- generated from the schema -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", [GenerationMode.NEGATIVE, GenerationMode.POSITIVE])
def test_what_the_schema_allows_and_what_it_does_not(client, mode):
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    base = str(client.base_url)
    wanted = [
        checks.not_a_server_error,
        more_checks.status_code_conformance,
        more_checks.content_type_conformance,
        more_checks.response_schema_conformance,
        more_checks.negative_data_rejection,
    ]
    operations = [each.ok() for each in schema.get_all_operations()]
    assert {each.path for each in operations} >= set(GOOD)
    for operation in operations:
        if mode == GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing about them can be wrong

        @hypothesis.settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            answer = case.call_and_validate(base_url=base, checks=wanted)
            if answer.status_code >= 400:
                assert problem(answer.status_code, answer.headers["content-type"][0], answer.content) is None

        check()
