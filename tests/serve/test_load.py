"""Many clients at once: no request is lost, and each has its own answer, known from the pipelines."""

import asyncio
import json

import httpx2
import numpy as np
import pytest

from blip2.decoding.options import Decoding
from blip2.serve.app import create_app
from conftest import COLORS, SHAPES, draw
from fixtures.service import build_writer, data_url, serve

CLIENTS, TOKENS = 16, 6
WORDS = ("what is it", "how many things are there", "is it a disc or a square")


@pytest.fixture(scope="module")
def writer(parts):
    return build_writer(parts)


def cases():
    """(image, text) pairs, all different."""
    images = [draw(shape, color, 0) for shape in SHAPES for color in COLORS]
    return [(image, f"{text} {number}") for number, image in enumerate(images) for text in WORDS]


def requests(writer, pipeline):
    """(path, body, the part of the answer that is compared, what it has to be) of each request."""
    found = []
    for number, (image, text) in enumerate(cases()):
        part = {"type": "image_url", "image_url": {"url": data_url(image)}}
        kind = number % 3
        if kind < 2:
            messages = [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
            body = {"model": "writer", "messages": messages, "max_tokens": TOKENS + number % 4, "stream": kind == 1}
            chat = writer.chat(image, decoding=Decoding(num_beams=1, max_new_tokens=TOKENS + number % 4))
            found.append(("/v1/chat/completions", body, chat.ask(text)))
        else:
            body = {"model": "reader", "input": [text, {"image": data_url(image)}]}
            vectors = pipeline.embed_images([image])[0].mean(dim=0)
            found.append(("/v1/embeddings", body, np.asarray(vectors / vectors.norm())))
    return found


async def send(port, wanted):
    """The answers, asked for by many clients."""
    answers = [None] * len(wanted)
    places = iter(range(len(wanted)))
    limits = httpx2.Limits(max_connections=CLIENTS)
    async with httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits, trust_env=False
    ) as http:

        async def client():
            for place in places:
                path, body, _ = wanted[place]
                answer = await http.post(path, json=body)
                assert answer.status_code == 200, answer.text
                answers[place] = answer

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


def text_of(answer):
    """The text of a whole or a streamed answer."""
    if answer.headers["content-type"].startswith("application/json"):
        return answer.json()["choices"][0]["message"]["content"]
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_every_request_of_many_clients_has_its_own_answer(writer, pipeline):
    wanted = requests(writer, pipeline)
    texts = [expected for _, _, expected in wanted if isinstance(expected, str)]
    assert len(wanted) == 36 and len(set(texts)) > len(texts) * 3 // 4  # a swapped answer would be seen
    with serve(create_app({"reader": pipeline, "writer": writer})) as port:
        answers = asyncio.run(send(port, wanted))
    for answer, (_, body, expected) in zip(answers, wanted, strict=True):
        if isinstance(expected, str):
            assert text_of(answer) == expected, body
        else:
            np.testing.assert_allclose(answer.json()["data"][1]["embedding"], expected, atol=1e-5)
