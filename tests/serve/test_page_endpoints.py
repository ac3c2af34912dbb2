"""The endpoints that were made for the web page: explanations of answers, and the images of a library."""

import io
import json

import httpx2
import numpy as np
import pytest
from PIL import Image

from blip2.search.indexing import index
from blip2.search.library import Library
from blip2.serve.app import create_app
from blip2.serve.options import ServeOptions
from conftest import draw
from fixtures.library import draw_photos
from fixtures.service import build_writer, data_url, serve

IMAGE = draw("disc", "red", 0)
PART = {"type": "image_url", "image_url": {"url": data_url(IMAGE)}}


@pytest.fixture(scope="module")
def writer(parts):
    return build_writer(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("library") / "photos")


@pytest.fixture(scope="module")
def library(pipeline, folder, tmp_path_factory):
    uri = tmp_path_factory.mktemp("library")
    index(pipeline, str(folder), uri)
    return Library.open(uri, pipeline)


@pytest.fixture(scope="module")
def http(writer, pipeline, library):
    app = create_app({"writer": writer, "matcher": pipeline}, library, ServeOptions(max_tokens=50))
    with serve(app) as port, httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        yield http


TOKENS = [10, 200, 30]


def explain(http, messages, token_ids=TOKENS, model="writer"):
    return http.post("/v1/explain", json={"model": model, "messages": messages, "token_ids": token_ids})


def question(text):
    return {"role": "user", "content": [PART, {"type": "text", "text": text}]}


@pytest.mark.parametrize("kind", ["caption", "question", "conversation"])
def test_an_explanation_is_that_of_the_pipeline(http, writer, kind):
    follow_up = [question("what"), {"role": "assistant", "content": "it"}, {"role": "user", "content": "and where"}]
    messages = {"caption": [{"role": "user", "content": [PART]}], "question": [question("what")]}.get(kind, follow_up)
    about = {
        "caption": {},
        "question": {"question": "what"},
        "conversation": {"prompt": "Question: what Answer: it. Question: and where Answer:"},
    }[kind]
    own = writer.explain(IMAGE, TOKENS, **about)
    made = explain(http, messages).json()
    assert [each["token"] for each in made["tokens"]] == list(own.tokens)
    np.testing.assert_allclose([each["logprob"] for each in made["tokens"]], own.token_log_probs, atol=1e-4)
    np.testing.assert_allclose([each["blank_logprob"] for each in made["tokens"]], own.blank_log_probs, atol=1e-4)
    np.testing.assert_allclose([each["effects"] for each in made["tokens"]], own.effects, atol=1e-4)
    maps = np.asarray(made["maps"])
    assert maps.shape == (4, 4, 4)  # the tiny encoder has a [CLS] before its grid
    np.testing.assert_allclose(maps.reshape(4, 16), own.attention_map[:, 1:], atol=1e-6)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", ["", "what"])
def test_the_tokens_that_were_generated_are_explained(http, writer, asked, stream):
    messages = [question(asked)] if asked else [{"role": "user", "content": [PART]}]
    body = {"model": "writer", "messages": messages, "max_tokens": 12, "logprobs": True, "return_token_ids": True}
    response = http.post("/v1/chat/completions", json={**body, "stream": stream})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(each)["choices"][0] for each in lines] if stream else response.json()["choices"]
    token_ids = [token for each in choices for token in each.get("token_ids", [])]
    listed = [one for each in choices if each.get("logprobs") for one in each["logprobs"]["content"]]
    text = writer.tokenizer.decode(token_ids)
    assert len(token_ids) == 12 and writer.tokenizer(text, add_special_tokens=False)["input_ids"] != token_ids
    found = explain(http, messages, token_ids).json()["tokens"]
    assert len(found) == 12
    first = next(i for i, each in enumerate(found) if each["token"] == listed[0]["token"])  # after white space
    found = found[first : first + len(listed)]
    assert [(each["token"], each["bytes"]) for each in found] == [(each["token"], each["bytes"]) for each in listed]
    np.testing.assert_allclose([each["logprob"] for each in found], [each["logprob"] for each in listed], atol=1e-4)


@pytest.mark.parametrize(
    ("messages", "token_ids", "model", "expected"),
    [
        ([{"role": "user", "content": "what"}], [1], "writer", "the messages have 0 images, expected one"),
        ([{"role": "user", "content": [PART, PART]}], [1], "writer", "the messages have 2 images, expected one"),
        ([{"role": "user", "content": [{"type": "text", "text": "look"}, PART]}], [1], "writer", "put it first"),
        ([question("what")], [1], "matcher", "the model matcher cannot do this: use writer"),
        ([question("what")], [1], "none", "the model 'none' does not exist here"),
        ([question("what")], [-1], "writer", "the tokens are [-1], expected ids from 0 to 257"),
        ([question("what")], [1] * 51, "writer", "the answer has 51 tokens, expected at most 50"),
        ([question("what"), {"role": "assistant", "content": "it"}], [1], "writer", "there is no question to answer"),
        ([], [1], "writer", "messages"),
    ],
)
def test_what_cannot_be_explained_is_refused(http, messages, token_ids, model, expected):
    response = explain(http, messages, token_ids, model)
    assert response.status_code in (400, 404) and expected in response.json()["error"]["message"]


def test_an_image_of_the_library_is_sent_small_and_without_metadata(http, library, folder):
    [hit] = http.post("/v1/search", json={"query": "red", "top_k": 1}).json()["data"]
    response = http.get(hit["url"])
    assert response.headers["content-type"] == "image/jpeg"
    image = Image.open(io.BytesIO(response.content))
    name = next(each.image for each in library.search("red", k=1))
    original = np.asarray(Image.open(folder / name).convert("RGB"), np.float32)
    assert np.abs(np.asarray(image, np.float32) - original).mean() < 8 and not image.getexif()


@pytest.mark.parametrize("digest", ["0" * 32, "0" * 31, "' OR 1=1 --", "..%2f..%2fetc%2fpasswd", "%00"])
def test_an_image_that_is_not_in_the_library_is_not_found(http, digest):
    response = http.get(f"/v1/search/images/{digest}")
    assert response.status_code == 404 and json.loads(response.text)["error"]["message"]


def test_an_image_that_changed_is_not_sent(http, library, folder):
    hit = library.search("a green stripe", k=1)[0]
    draw("disc", "blue", 50).save(folder / hit.image)
    assert http.get(f"/v1/search/images/{hit.digest}").status_code == 404
