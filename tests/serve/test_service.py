"""The service as OpenAI's own client sees it: each answer is that of the pipelines for the same request alone."""

import asyncio
import base64
import json
import logging
import shutil
import threading
import time
import weakref

import httpx2
import numpy as np
import openai
import pytest
import torch

from blip2.decoding.continuous import ContinuousBatch
from blip2.decoding.options import CAPTION_DECODING, CHAT_DECODING, Decoding
from blip2.errors import InputError
from blip2.search.indexing import index
from blip2.search.library import Library
from blip2.serve.app import create_app
from blip2.serve.engine import Generation, LocalEngine
from blip2.serve.errors import ApiError
from blip2.serve.gate import Gate
from blip2.serve.images import ImageReader
from blip2.serve.metrics import Metrics
from blip2.serve.options import ServeOptions
from blip2.serve.service import Service
from blip2.serve.tokens import ShownTokens, describe_token
from conftest import COLORS, SHAPES, draw
from fixtures.library import draw_photos
from fixtures.service import PausingEngine, build_writer, data_url, serve

KEY = "a-key-of-some-length"
GREEDY = Decoding(num_beams=1, max_new_tokens=12)
IMAGES = [draw(shape, color, 0) for shape in SHAPES for color in COLORS]


@pytest.fixture(scope="module")
def writer(parts):
    return build_writer(parts)


@pytest.fixture(scope="module")
def library(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    photos = draw_photos(folder / "photos")
    rows = [{"image": path.name, "captions": ["a thing"], "year": n} for n, path in enumerate(sorted(photos.iterdir()))]
    (photos / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index(pipeline, str(photos / "table.jsonl"), folder / "library")
    return Library.open(folder / "library", pipeline)


@pytest.fixture(scope="module")
def address(writer, pipeline, library):
    app = create_app({"writer": writer, "reader": pipeline}, library, ServeOptions(max_batch_size=8), [KEY])
    with serve(app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(address):
    with httpx2.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http


ENUM = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": ["a", "b"]}}}


def picture(number=0):
    return {"type": "image_url", "image_url": {"url": data_url(IMAGES[number])}}


def ask(text="what is it", *numbers):
    parts = [picture(number) for number in numbers or (0,)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat(client, messages, **options):
    return client.chat.completions.create(**{"model": "writer", "messages": messages, "max_tokens": 12, **options})


# -- conversations -----------------------------------------------------------------------------------------------------


def test_models(client):
    assert [(each.id, each.stage) for each in client.models.list()] == [
        ("writer", "generation"),
        ("reader", "representation"),
    ]
    assert client.models.retrieve("reader").id == "reader"


def test_answers_are_those_of_a_chat(client, writer):
    first = chat(client, ask())
    assert first.choices[0].message.content == writer.chat(IMAGES[0], decoding=GREEDY).ask("what is it") != ""
    assert first.choices[0].finish_reason == "length" and first.usage.completion_tokens == 12
    assert first.usage.prompt_tokens == writer.chat(IMAGES[0]).encode_prompt("what is it").attention_mask.sum()
    history = [*ask(), {"role": "assistant", "content": first.choices[0].message.content}]
    second = chat(client, [*history, {"role": "user", "content": "and now"}])
    again = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": history[1]["content"]}]
    assert second.choices[0].message.content == writer.chat(IMAGES[0], again, decoding=GREEDY).ask("and now")
    two = chat(client, [{"role": "system", "content": "be brief"}, *ask("compare", 1, 2)])
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "compare"}]
    assert two.choices[0].message.content == writer.chat(IMAGES[1:3], messages, decoding=GREEDY).ask()


def test_an_image_alone_is_captioned(client, writer):
    made = chat(client, [{"role": "user", "content": [picture(3)]}], logprobs=True, top_logprobs=2)
    [own] = writer.caption(IMAGES[3], decoding=GREEDY, details=True)
    [choice] = made.choices
    assert choice.message.content == own.text
    listed = choice.logprobs.content
    assert tuple(each.token for each in listed) == own.tokens[: len(listed)]
    assert not "".join(own.tokens[len(listed) :]).strip()  # white space at the end is not part of the text
    np.testing.assert_allclose([each.logprob for each in listed], own.token_log_probs[: len(listed)], atol=1e-3)
    best = [each.top_logprobs for each in listed]
    assert all(len(each) == 2 and each[0].logprob >= each[1].logprob for each in best)
    default = chat(client, [{"role": "user", "content": [picture(3)]}], max_tokens=openai.omit)
    assert default.usage.completion_tokens == CAPTION_DECODING.max_new_tokens < CHAT_DECODING.max_new_tokens


def test_a_stream_is_the_answer_in_pieces(client):
    whole = chat(client, ask(), n=2, temperature=1.0, seed=3, logprobs=True)
    texts, reasons, tokens, usage = ["", ""], [None, None], [[], []], None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in chat(client, ask(), n=2, temperature=1.0, seed=3, logprobs=True, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert [[each.token for each in one] for one in tokens] == [
        [each.token for each in choice.logprobs.content] for choice in whole.choices
    ]


def join(tokens):
    """Return the text of tokens, of which several may be one character."""
    return b"".join(bytes(each.bytes) for each in tokens).decode(errors="replace").strip()


def test_a_stop_string_ends_the_text_before_it(client):
    [choice] = chat(client, ask(), logprobs=True).choices
    text = choice.message.content
    assert join(choice.logprobs.content) == text
    stop = text[5:7]
    stopped = chat(client, ask(), stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)].strip()
    assert stopped.choices[0].finish_reason == "stop"
    choices = [chunk.choices[0] for chunk in chat(client, ask(), stop=[stop, "zz"], logprobs=True, stream=True)]
    assert "".join(each.delta.content or "" for each in choices) == stopped.choices[0].message.content
    listed = [one for each in choices for one in (each.logprobs.content if each.logprobs else [])]
    whole = choice.logprobs.content[: len(listed)]
    assert [one.token for one in listed] == [one.token for one in whole]
    assert join(listed) == stopped.choices[0].message.content


def test_a_fixed_choice_is_the_most_likely_text(client, writer):
    texts = ["a red disc", "b", "a blue stripe"]
    enum = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": texts}}}
    made = chat(client, ask(), response_format=enum, logprobs=True, top_logprobs=3, max_tokens=openai.omit)
    [ranked] = writer.rank(IMAGES[0], texts, "what is it")
    assert json.loads(made.choices[0].message.content) == ranked[0].text
    found = made.choices[0].logprobs.content[0].top_logprobs
    assert [each.token for each in found] == [each.text for each in ranked]
    np.testing.assert_allclose(np.exp([each.logprob for each in found]), [each.probability for each in ranked], 1e-3)
    properties = {"type": "object", "properties": {"answer": {"enum": texts}}}
    enum["json_schema"]["schema"] = properties
    answer = chat(client, ask(), response_format=enum).choices[0].message.content
    assert json.loads(answer) == {"answer": ranked[0].text}
    with pytest.raises(openai.BadRequestError, match="not a fixed choice"):
        enum["json_schema"]["schema"] = {"type": "number"}
        chat(client, ask(), response_format=enum)


# -- texts and images as vectors ---------------------------------------------------------------------------------------


def test_embeddings(client, http, pipeline):
    texts = ["a red disc", "a blue stripe"]
    made = client.embeddings.create(model="reader", input=texts)  # the client asks for base64
    np.testing.assert_allclose([each.embedding for each in made.data], pipeline.embed_texts(texts), atol=1e-5)
    items = [picture(1), {"image": data_url(IMAGES[2])}, {"text": "a red disc"}]
    body = {"model": "reader", "input": items, "multivector": True}
    data = http.post("/v1/embeddings", json=body).json()["data"]
    own = pipeline.embed_images(IMAGES[1:3])
    np.testing.assert_allclose([each["vectors"] for each in data[:2]], own, atol=1e-5)
    mean = torch.nn.functional.normalize(own.mean(dim=1), dim=-1)
    np.testing.assert_allclose([each["embedding"] for each in data[:2]], mean, atol=1e-5)
    np.testing.assert_allclose(data[2]["embedding"], pipeline.embed_texts("a red disc")[0], atol=1e-5)


def test_rerank(http, pipeline):
    body = {"model": "reader", "query": "a red disc", "documents": ["a disc", "a stripe"]}
    texts = http.post("/v1/rerank", json=body)
    assert texts.status_code == 400 and "are texts" in texts.json()["error"]["message"]
    body["documents"] = [{"image": data_url(each)} for each in IMAGES[:5]]
    made = http.post("/v1/rerank", json={**body, "top_n": 4}).json()
    itm, itc = (function(IMAGES[:5], "a red disc")[:, 0] for function in (pipeline.match, pipeline.similarity))
    order = itm.argsort(descending=True)[:4]
    assert [each["index"] for each in made["results"]] == order.tolist()
    np.testing.assert_allclose([each["relevance_score"] for each in made["results"]], itm[order], atol=1e-5)
    np.testing.assert_allclose([each["itc"] for each in made["results"]], itc[order], atol=1e-5)
    about = {"model": "reader", "query": {"image": data_url(IMAGES[0])}, "documents": ["a b", "c", picture(0)]}
    results = http.post("/v1/rerank", json={**about, "return_documents": True}).json()["results"]
    by_index = {each["index"]: each for each in results}
    np.testing.assert_allclose(by_index[1]["itm"], pipeline.match(IMAGES[0], "c")[0, 0], atol=1e-5)
    assert by_index[2]["itm"] is None and by_index[2]["itc"] == pytest.approx(1, abs=1e-5)
    assert by_index[0]["document"] == {"text": "a b"} and "document" not in by_index[2]


def test_search(http, library):
    made = http.post("/v1/search", json={"query": "a red disc", "top_k": 3}).json()["data"]
    hits = library.search("a red disc", 3)
    assert [each["id"] for each in made] == [hit.digest for hit in hits]
    np.testing.assert_allclose([each["itm"] for each in made], [hit.match for hit in hits], atol=1e-5)
    assert "photos" not in json.dumps(made)
    some = {"query": {"image": data_url(IMAGES[0])}, "filter": {"year": {"gte": 3, "lt": 8}}}
    found = http.post("/v1/search", json=some).json()["data"]
    assert sorted(each["metadata"]["year"] for each in found) == [3, 4, 5, 6, 7]
    own = library.search(IMAGES[0], 10, "year >= 3 AND year < 8")
    assert [each["id"] for each in found] == [hit.digest for hit in own]
    np.testing.assert_allclose([each["itc"] for each in found], [hit.similarity for hit in own], atol=1e-5)
    some["filter"] = {"year": [1, 2]}
    assert len(http.post("/v1/search", json=some).json()["data"]) == 2
    for wrong in ({"year` OR 1=1 --": 3}, {"source": "x"}, {"year": []}, {"year": {}}):
        answer = http.post("/v1/search", json={**some, "filter": wrong})
        assert answer.status_code == 400 and str(library.uri) not in answer.text


def test_attention(http, pipeline, writer):
    weights = pipeline.attention_maps(IMAGES[0], "a red disc")[0, -1]
    body = {"model": "reader", "image": data_url(IMAGES[0]), "text": "a red disc"}
    made = http.post("/v1/attention", json=body).json()
    grid = weights[0, -made["width"] * made["height"] :].view(made["height"], made["width"])
    np.testing.assert_allclose(made["queries"][0], grid / grid.max(), atol=1e-4)
    assert len(made["queries"]) == 4 and np.max(made["mean"]) == 1
    other = http.post("/v1/attention", json={"model": "writer", "image": data_url(IMAGES[0])})
    assert other.status_code == 200
    refused = http.post("/v1/attention", json={**body, "model": "writer"})
    assert refused.status_code == 400 and "does not read questions" in refused.json()["error"]["message"]


# -- many clients ------------------------------------------------------------------------------------------------------


def test_each_of_many_clients_gets_its_own_answer(address, client, pipeline):
    """Conversations, captions and embeddings at the same time; each as it is when it comes alone."""
    requests = []
    for number, _ in enumerate(IMAGES):
        seed = {"temperature": 1.2, "top_p": 0.9, "seed": number} if number % 2 else {}
        requests.append({"messages": ask(f"what is {number}", number), "max_tokens": 3 + number, **seed})
    alone = [chat(client, **each).choices[0].message.content for each in requests]
    assert len(set(alone)) > 8
    vectors = pipeline.embed_texts([f"thing {number}" for number in range(12)])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60) as many:
            chats = [many.chat.completions.create(model="writer", **each) for each in requests]
            texts = [many.embeddings.create(model="reader", input=f"thing {n}") for n in range(12)]
            return await asyncio.gather(*chats, *texts)

    answers = asyncio.run(ask_all())
    assert [each.choices[0].message.content for each in answers[:12]] == alone
    np.testing.assert_allclose([each.data[0].embedding for each in answers[12:]], vectors, atol=1e-5)
    wait_until(lambda: "\nblip2_requests_in_flight 0.0\n" in httpx2.get(f"{address}/metrics").text)


def test_sampled_texts_are_those_of_the_pipeline(writer):
    """A seed gives the texts that the pipeline writes with the same random numbers."""
    engine = LocalEngine(4)
    decoding = Decoding(top_p=0.9, temperature=1.3, max_new_tokens=10)
    prompt = writer.encode_prompt(IMAGES[0], decoding=decoding)

    async def collect():
        texts = [""] * 3
        async for piece in engine.stream(Generation(writer, prompt, decoding, 3, seed=5)):
            texts[piece.index] += piece.text
        return texts

    uniforms = torch.rand(3, 10, generator=torch.Generator().manual_seed(5))
    own = writer.generate(IMAGES[0], [writer.config.language.prompt], decoding, 3, uniforms=uniforms)
    assert asyncio.run(collect()) == own
    asyncio.run(engine.close())


def test_a_failing_pass_ends_its_texts_and_nothing_else(writer, monkeypatch):
    engine = LocalEngine(4)
    decoding = Decoding(num_beams=1, max_new_tokens=3)
    generation = Generation(writer, writer.encode_prompt(IMAGES[0], decoding=decoding), decoding, 2)

    async def collect():
        return [len(piece.token_ids) async for piece in engine.stream(generation)]

    with monkeypatch.context() as patch:
        patch.setattr(ContinuousBatch, "advance", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(collect())
    assert engine.is_ready() and len(asyncio.run(collect())) == 6
    asyncio.run(engine.close())


def test_tokens_that_the_client_does_not_see_are_not_listed(writer):
    """White space at both ends, the end token and a stop text; what may be one of them waits."""
    shown, listed = ShownTokens(writer.tokenizer), []
    ids = [writer.tokenizer(each, add_special_tokens=False)["input_ids"][0] for each in " a b xy "]
    seen = ["", "a", "a", "a b", "a b", "a b", "a b", "a b", "a b"]  # what the client has after each token
    for token, text in zip([*ids, writer.eos_token_id], seen, strict=True):
        shown.add(token, -1.0, [])
        listed.append("".join(each.token for each in shown.take(text)))
    assert listed == ["", "a", "", " b", "", "", "", "", ""]


def test_an_idle_engine_holds_nothing():
    engine, items = LocalEngine(), [np.zeros(1)]
    held = weakref.ref(items[0])
    asyncio.run(engine.submit(lambda arrays: [each.sum() for each in arrays], items))
    items.clear()
    wait_until(lambda: held() is None)
    asyncio.run(engine.close())


def test_bytes_of_a_part_of_a_character(writer):
    tokens = writer.tokenizer("é", add_special_tokens=False)["input_ids"]
    made = [describe_token(writer.tokenizer, token) for token in tokens]
    assert len(made) == 2 and bytes(byte for each in made for byte in each["bytes"]).decode() == "é"
    # Both are listed as soon as the character is there.
    shown = ShownTokens(writer.tokenizer)
    shown.add(tokens[0], -1.0, [])
    assert shown.take("") == ()
    shown.add(tokens[1], -2.0, [(tokens[1], -2.0)])
    assert [each.logprob for each in shown.take("é")] == [-1.0, -2.0] and shown.take("é") == ()
    assert describe_token(writer.tokenizer, writer.tokenizer("a")["input_ids"][-1]) == {"token": "a", "bytes": [97]}


def test_hosts_by_which_the_service_may_be_called():
    options = ServeOptions(allowed_hosts=["blip2.example.com", "*.Example.org", "[::1]", "127.0.0.1"])
    with serve(create_app({}, options=options)) as port:
        for host, status in (
            ("blip2.example.com", 200),
            ("BLIP2.example.com:8443", 200),
            ("a.b.example.org", 200),
            ("[::1]:8000", 200),
            (f"127.0.0.1:{port}", 200),
            ("example.com", 400),
            ("example.org", 400),
            ("evil-example.org", 400),
            ("blip2.example.com.evil.com", 400),
            ("blip2.example.com@evil.com", 400),
            ("evil.com#.example.org", 400),
            ("blip2.example.com:x", 400),
            ("[::1", 400),
            ("", 400),
        ):
            for path in ("/health", "/v1/models"):
                response = httpx2.get(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
                assert response.status_code == status, host
                assert status == 200 or response.json()["error"]["code"] == "invalid_host"
    with serve(create_app({}, options=ServeOptions(allowed_hosts=["a.com", "*"]))) as port:
        assert httpx2.get(f"http://127.0.0.1:{port}/health", headers={"Host": "evil.com"}).status_code == 200
    for wrong in ("https://example.com", "example.com:80", "", "*example.com", "a b"):
        with pytest.raises(InputError, match="expected the name of a host"):
            create_app({}, options=ServeOptions(allowed_hosts=[wrong]))


def test_keys_of_an_application_below_a_path():
    gate = Gate(create_app({}), ServeOptions(), [KEY], Metrics())
    for path, root in (("/v1/models", ""), ("/below/v1/models", "/below"), ("/below/v1/models", "/below/")):
        scope = {"path": path, "root_path": root, "headers": []}
        with pytest.raises(ApiError, match="missing or wrong"):
            gate.check_key(scope)
        gate.check_key({**scope, "headers": [(b"authorization", f"Bearer {KEY}".encode())]})
    gate.check_key({"path": "/below/health", "root_path": "/below", "headers": []})
    with pytest.raises(InputError, match="api_keys is a str"):
        create_app({}, api_keys=KEY)


def long(client, **options):
    return chat(client, ask(), max_tokens=1000, **options)


def pausing(metrics):
    """An engine that never ends a long text."""
    return PausingEngine(threading.Event(), 16, metrics)


def wait_until(true):
    for _ in range(3000):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError


def test_a_full_queue_and_clients_that_leave(writer):
    app = create_app({"writer": writer}, None, ServeOptions(max_queue=2), (), pausing)
    with (
        serve(app) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as client,
    ):
        metrics = lambda: httpx2.get(f"http://127.0.0.1:{port}/metrics").text  # noqa: E731
        streams = [long(client, stream=True) for _ in range(2)]
        assert [next(iter(each)).choices[0].index for each in streams] == [0, 0]
        with pytest.raises(openai.RateLimitError) as full:
            chat(client, ask())
        assert full.value.response.headers["retry-after"] == "1" and full.value.code == "queue_full"
        streams[0].close()
        wait_until(lambda: "blip2_requests_in_flight 1" in metrics())
        assert chat(client, ask(), max_tokens=2).choices[0].message.content is not None
        streams[1].close()
        wait_until(lambda: "blip2_running_texts 0" in metrics() and "blip2_requests_in_flight 0" in metrics())
        with pytest.raises(openai.APITimeoutError):  # this client does not wait either
            long(client.with_options(timeout=0.5))
        wait_until(lambda: 'outcome="client_left",route="/v1/chat/completions",status="0"' in metrics())
        wait_until(lambda: "blip2_running_texts 0" in metrics())


def test_a_request_ends_at_its_deadline(writer):
    app = create_app({"writer": writer}, None, ServeOptions(deadline=0.2), (), pausing)
    with (
        serve(app) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as late:
            long(client)
        assert late.value.status_code == 504 and late.value.code == "deadline"
        with pytest.raises(openai.APIError, match=r"not ready within 0\.2 seconds"):
            list(long(client, stream=True))


def test_nothing_goes_on_after_an_image_that_is_refused():
    """Otherwise work and images pile up behind requests that are answered and no longer counted."""
    engine, read, left = LocalEngine(), [], threading.Event()

    class Reader(ImageReader):
        async def read(self, *arguments):
            try:
                return await super().read(*arguments)
            except asyncio.CancelledError:
                left.set()
                raise

    class Model:
        def preprocess(self, image):
            read.append(image)
            left.wait(10)

    async def run():
        service = Service(engine, {}, Reader(), ServeOptions())
        urls = [data_url(image) for image in IMAGES[:8]]
        with pytest.raises(InputError, match="expected a data URL in base64"):
            await service.encode(Model(), [*urls, "data:nothing"], "messages")
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(read) <= 2  # DECODERS, which had begun

    asyncio.run(run())
    asyncio.run(engine.close())


# -- who may ask, and what is told -------------------------------------------------------------------------------------


def test_errors_have_openai_s_shape(client, address, library):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            chat(stranger, ask())
    for status, kind, options in (
        (404, openai.NotFoundError, {"model": "other"}),
        (400, openai.BadRequestError, {"model": "reader"}),
        (400, openai.BadRequestError, {"max_tokens": 10_000}),
        (400, openai.BadRequestError, {"n": 9}),  # --max-batch-size is 8
        (400, openai.BadRequestError, {"n": 9, "temperature": 1.0, "stream": True}),
        (400, openai.BadRequestError, {"top_logprobs": 2}),
        (400, openai.BadRequestError, {"stream_options": {"include_usage": True}}),
        (400, openai.BadRequestError, {"messages": [{**ask()[0], "role": "assistant"}], "response_format": ENUM}),
        (400, openai.BadRequestError, {"temperature": 3.0}),
        (400, openai.BadRequestError, {"messages": [{"role": "assistant", "content": "a"}]}),
        (400, openai.BadRequestError, {"messages": ask("words " * 10_000)}),
        (400, openai.BadRequestError, {"messages": ask("x", *range(12), *range(12))}),
        (400, openai.BadRequestError, {"tools": []}),
        (400, openai.BadRequestError, {"frequency_penalty": 1.0}),
    ):
        with pytest.raises(kind) as error:
            chat(client, **{"messages": ask(), **options})
        assert error.value.status_code == status
        assert set(error.value.body) == {"message", "type", "param", "code"}
        assert "/" not in error.value.body["message"].replace("reset() (/reset)", "")


def test_a_body_that_is_not_declared_as_json(http):
    sent = http.post("/v1/search", content='{"query": "red"}', headers={"Content-Type": "text/plain"})
    assert sent.status_code == 400
    assert sent.json()["error"]["message"] == (
        "the Content-Type of the body is text/plain, expected application/json: set this header"
    )
    sent = http.post("/v1/search", content='{"query": 1}', headers={"Content-Type": "application/json; charset=utf-8"})
    assert sent.status_code == 400 and sent.json()["error"]["param"].startswith("query")  # the field of this name


def test_a_library_that_is_damaged_meanwhile(pipeline, tmp_path, caplog):
    """It is the fault of the server, whose paths are for its log alone; LanceDB writes some without the first slash."""
    index(pipeline, str(draw_photos(tmp_path / "photos")), tmp_path / "library")
    library = Library.open(tmp_path / "library", pipeline)
    shutil.rmtree(tmp_path / "library")
    with serve(create_app({"reader": pipeline}, library)) as port, httpx2.Client(trust_env=False) as http:
        for answer in (
            http.post(f"http://127.0.0.1:{port}/v1/search", json={"query": "red"}),
            http.post(f"http://127.0.0.1:{port}/v1/search", json={"query": "red", "filter": {"year": 1}}),
            http.get(f"http://127.0.0.1:{port}/v1/search/images/{'0' * 32}"),
        ):
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the library cannot be read at the moment: try again later"
    assert str(tmp_path / "library") in caplog.text


def test_the_log_has_no_content(client, http, caplog):
    caplog.set_level(logging.INFO, "blip2.serve")
    words = "xylophone"
    text = chat(client, ask(words)).choices[0].message.content
    http.get(f"/{words}?q={words}")
    assert client.embeddings.create(model="reader", input=words).data
    statuses = {"/v1/chat/completions": 200, "none": 404, "/v1/embeddings": 200}

    def lines():  # a line may come after that of the next request, so the last test's may be here too
        return {line["route"]: line for line in (json.loads(record.getMessage()) for record in caplog.records)}

    wait_until(lambda: statuses.keys() <= lines().keys())
    by_route = lines()
    assert {route: by_route[route]["status"] for route in statuses} == statuses
    assert by_route["/v1/chat/completions"]["model"] == "writer"
    assert by_route["/v1/chat/completions"]["tokens"] == 12
    assert words not in caplog.text and text not in caplog.text and KEY not in caplog.text


def test_the_page_and_what_needs_no_key(address):
    page = httpx2.get(address)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert httpx2.get(address + path).status_code == 200
    for path in ("/docs", "/static/../app.py", "/static/%2e%2e/app.py"):
        assert httpx2.get(address + path).status_code in (401, 404)
    assert httpx2.post(address, content=b"x").json()["error"]["type"] == "invalid_request_error"


def test_base64_of_an_embedding(http, pipeline):
    body = {"model": "reader", "input": "a", "encoding_format": "base64"}
    encoded = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(encoded), "<f4"), pipeline.embed_texts("a")[0], atol=1e-5)


def test_a_failing_request_does_not_fail_those_beside_it():
    """Requests that are computed in one pass fail one by one."""
    engine, entered, go = LocalEngine(), threading.Event(), threading.Event()

    def block(items):
        entered.set()
        go.wait(10)
        return items

    def halve(items):
        if "bad" in items:
            raise ValueError("bad")
        return [(item, len(items)) for item in items]

    async def run():
        first = asyncio.ensure_future(engine.submit(block, [1]))
        await asyncio.to_thread(entered.wait)
        rest = [asyncio.ensure_future(engine.submit(halve, [each])) for each in ("a", "b")]
        await asyncio.sleep(0)
        together = asyncio.gather(*rest)
        go.set()
        assert await together == [[("a", 2)], [("b", 2)]]
        go.clear()
        entered.clear()
        again = asyncio.ensure_future(engine.submit(block, [1]))
        await asyncio.to_thread(entered.wait)
        mixed = [asyncio.ensure_future(engine.submit(halve, [each])) for each in ("a", "bad", "c")]
        await asyncio.sleep(0)
        mixed[2].cancel()
        go.set()
        results = await asyncio.gather(*mixed, return_exceptions=True)
        assert results[0] == [("a", 1)] and isinstance(results[1], ValueError)
        assert isinstance(results[2], asyncio.CancelledError)
        await asyncio.gather(first, again)

    asyncio.run(run())
    asyncio.run(engine.close())
