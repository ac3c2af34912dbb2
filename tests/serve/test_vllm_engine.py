"""The engine with vLLM: what it sends, and what it makes of the answer.

``VLLM_URL``, ``VLLM_MODEL`` and ``VLLM_CHECKPOINT`` name a real server (``vllm serve LLM --enable-prompt-embeds --dtype
float32``), its LLM, and a stage-2 checkpoint of this LLM.
"""

import asyncio
import base64
import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from blip2.decoding.options import Decoding
from blip2.errors import InputError
from blip2.serve.engine import Generation, LocalEngine
from blip2.serve.errors import ApiError
from blip2.serve.vllm import VllmEngine, check_decoder_only
from conftest import draw
from fixtures.service import build_writer

GREEDY = Decoding(num_beams=1, max_new_tokens=7)


class Handler(BaseHTTPRequestHandler):
    """Answers two texts, as vLLM streams them, to whatever it is sent."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append(body)
        status = 200 if body["model"] == "llm" else 400
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if status == 200 else "application/json")
        self.end_headers()
        if status != 200:
            self.wfile.write(b'{"error": {"message": "secret address"}}')
            return
        pieces = [(0, " a", None), (1, "b ", None), (0, " r", None), (1, "c", "length")]
        pieces += [(0, "", None), (0, " ", "stop")]  # a token whose text vLLM holds back, and the end token
        tokens = {0: [[" ", "a"], [" ", "r"], ["x"], ["end"]], 1: [["b", " "], ["c"]]}
        for number, (index, text, reason) in enumerate(pieces[: len(pieces) - (body["seed"] == 4)]):
            count = sum(each[0] == index for each in pieces[: number + 1])
            token_ids = [self.server.ids[each] for each in tokens[index][count - 1]]
            names = [f"token_id:{each}" for each in token_ids]
            best = [{name: -0.5, f"token_id:{self.server.ids['z']}": -0.25} for name in names]
            log_probs = {"tokens": names, "token_logprobs": [-0.5 for _ in names], "top_logprobs": best}
            choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": log_probs}
            choice |= {"token_ids": token_ids} if body["return_token_ids"] and body["seed"] != 5 else {}
            chunk = {"id": "1", "object": "text_completion", "created": 1, "model": "llm", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(writer):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.received = []
    server.ids = {each: writer.tokenizer(each, add_special_tokens=False)["input_ids"][0] for each in " abcrxz"}
    server.ids["end"] = writer.eos_token_id
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(engine, generation):
    async def collect():
        try:
            return [piece async for piece in engine.stream(generation)]
        finally:
            await engine.close()

    return asyncio.run(collect())


@pytest.fixture(scope="module")
def writer(parts):
    return build_writer(parts)


def test_what_is_sent_and_read(writer, server):
    prompt = writer.chat(draw("disc", "red", 0)).encode_prompt("what is it")
    decoding = Decoding(top_p=0.8, temperature=0.7, max_new_tokens=7, stop_strings=("x",))
    url = f"http://127.0.0.1:{server.server_port}/v1"
    pieces = run(VllmEngine(url, "llm"), Generation(writer, prompt, decoding, n=2, seed=3, num_alternatives=1))
    [sent] = server.received
    texts = ["".join(piece.text for piece in pieces if piece.index == index) for index in (0, 1)]
    assert texts == ["a r", "b c"] and len(pieces) == 6
    made = [[token for piece in pieces if piece.index == index for token in piece.token_ids] for index in (0, 1)]
    assert made == [[server.ids[each] for each in (" ", "a", " ", "r", "x", "end")], [server.ids[e] for e in "b c"]]
    assert [piece.finish_reason for piece in pieces] == [None, None, None, "length", None, "stop"]
    tokens = [[one.token for piece in pieces if piece.index == index for one in piece.log_probs] for index in (0, 1)]
    assert tokens == [["a", " ", "r"], ["b", " ", "c"]]  # neither the stop text nor the end token
    assert pieces[0].log_probs[0].logprob == -0.5 and sent["return_tokens_as_token_ids"]
    assert [(best.token, best.logprob) for best in pieces[0].log_probs[0].top_logprobs] == [("z", -0.25)]
    tensor = torch.load(io.BytesIO(base64.b64decode(sent.pop("prompt_embeds"))), weights_only=True)
    assert torch.equal(tensor, prompt.text_embeds[0]) and tensor.ndim == 2
    assert {name: sent[name] for name in ("n", "seed", "max_tokens", "top_p", "temperature", "stop", "logprobs")} == {
        "n": 2, "seed": 3, "max_tokens": 7, "top_p": 0.8, "temperature": 0.7, "stop": ["x"], "logprobs": 1,
    }  # fmt: skip
    assert sent["stop_token_ids"] == [256] and sent["min_tokens"] == 1
    with pytest.raises(ApiError, match="does not answer") as error:
        run(VllmEngine(url, "other"), Generation(writer, prompt, GREEDY))
    assert "secret" not in str(error.value)
    with pytest.raises(ApiError, match="does not answer"):  # the answer ends before one of the texts
        run(VllmEngine(url, "llm"), Generation(writer, prompt, decoding, n=2, seed=4))
    with pytest.raises(ApiError, match=r"no token_ids .*: update vLLM") as error:  # a server too old for them
        run(VllmEngine(url, "llm"), Generation(writer, prompt, decoding, n=2, seed=5))
    assert error.value.status == 502


def test_an_encoder_decoder_is_refused(writer, monkeypatch):
    monkeypatch.setattr(writer.model.language, "is_encoder_decoder", True)
    with pytest.raises(InputError, match="leave out --vllm-url"):
        check_decoder_only(writer)


@pytest.mark.skipif("VLLM_URL" not in os.environ, reason="VLLM_URL names no vLLM server")
def test_greedy_texts_are_those_of_this_process(parts):
    from blip2.pipelines import load

    writer = load(os.environ["VLLM_CHECKPOINT"], "cpu", "fp32")
    prompts = [writer.encode_prompt(draw(shape, "red", 0), decoding=GREEDY) for shape in ("disc", "square", "stripe")]
    for prompt in prompts:
        generation = Generation(writer, prompt, GREEDY)
        theirs = run(VllmEngine(os.environ["VLLM_URL"], os.environ["VLLM_MODEL"]), generation)
        own = run(LocalEngine(), generation)
        assert "".join(each.text for each in theirs) == "".join(each.text for each in own)
        assert sum((each.token_ids for each in theirs), ()) == sum((each.token_ids for each in own), ())
