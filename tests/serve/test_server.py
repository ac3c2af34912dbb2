"""``blip2 serve`` as a process: it answers what it has begun before it ends, and refuses what it cannot serve."""

import os
import re
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path

import httpx2
import openai
import pytest

from blip2.decoding.continuous import ContinuousBatch
from blip2.errors import InputError
from blip2.serve.app import create_app
from blip2.serve.options import ServeOptions
from blip2.serve.server import default_hosts, find_vllm, name_models, read_keys, run
from conftest import draw
from fixtures.library import save_run
from fixtures.processes import start
from fixtures.service import data_url
from fixtures.tiny import save_writer

KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def writer_run(parts, tmp_path_factory):
    """A checkpoint of a tiny stage-2 model."""
    return save_writer(parts, tmp_path_factory.mktemp("writer"))


@pytest.fixture(scope="module")
def reader_run(parts, tmp_path_factory):
    return save_run(parts, tmp_path_factory.mktemp("reader"), seed=0)


def wait_for(log, pattern, process):
    for _ in range(1200):
        if found := re.search(pattern, log.read_text() if log.exists() else ""):
            return found
        assert process.is_alive(), log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def brake(file):
    """In a process of its own: a token takes a twentieth of a second while a file is there."""
    advance = ContinuousBatch.advance

    def slowly(self):
        time.sleep(0.05 * file.exists())
        advance(self)

    ContinuousBatch.advance = slowly


def test_sigterm_under_load(writer_run, reader_run, tmp_path):
    """Requests that have begun are answered in full, streams too; then the process ends with status 0."""
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text(f"# keys of clients\n{KEY}\n")
    arguments = ["serve", f"writer={writer_run}", f"reader={reader_run}", "--api-key-file", str(keys), "--port", "0"]
    slow = tmp_path / "slow"
    process = start([*arguments, "--device", "cpu", "--max-batch-size", "4"], log, partial(brake, slow))
    url = wait_for(log, r"listening on (http://\S+)", process)[1]
    image = {"type": "image_url", "image_url": {"url": data_url(draw("disc", "red", 0))}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "what is it"}]}]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
    options = {"model": "writer", "messages": messages, "max_tokens": 300}
    expected = client.chat.completions.create(**options)
    rebound = httpx2.get(f"{url}/health", headers={"Host": "evil.example"}).status_code
    begun, answers = threading.Semaphore(0), {}

    def ask(number):
        if number < 3:
            text = ""
            for chunk in client.chat.completions.create(**options, stream=True):
                if not text and chunk.choices[0].delta.content:
                    begun.release()
                text += chunk.choices[0].delta.content or ""
            answers[number] = text
        else:
            answers[number] = client.chat.completions.create(**options).choices[0].message.content

    slow.touch()  # no answer ends before the signal
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads[:3]:
        thread.start()
    for _ in range(3):
        assert begun.acquire(timeout=60)
    for thread in threads[3:]:
        thread.start()
    while "blip2_requests_in_flight 6" not in client.get("../metrics", cast_to=str):
        assert process.is_alive() and not answers
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    slow.unlink()
    for thread in threads:
        thread.join(60)
    assert answers == dict.fromkeys(range(6), expected.choices[0].message.content)
    process.join(60)
    printed = log.read_text()
    assert process.exitcode == 0, printed
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    client.close()
    assert rebound == 400
    assert "Traceback" not in printed and "what is it" not in printed and KEY not in printed
    assert printed.count('"route": "/v1/chat/completions", "status": 200') == 7


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {port}: give another"):
            run(create_app({}), ServeOptions(port=port))


def test_only_a_server_on_a_loopback_address_has_names_by_default():
    assert default_hosts("127.0.0.1") == default_hosts("localhost") == ["localhost", "127.0.0.1", "[::1]"]
    assert default_hosts("127.0.0.5")[-1] == "127.0.0.5" and default_hosts("::1") == default_hosts("localhost")
    assert default_hosts("0.0.0.0") == default_hosts("::") == default_hosts("server.example") == []


def test_vllm_runs_the_llm_of_one_model():
    with pytest.raises(InputError, match="needs exactly one stage-2 model, found 0: give one"):
        find_vllm({}, ServeOptions(vllm_url="http://127.0.0.1:1/v1"))


def test_names_of_models():
    assert name_models(["runs/vqa", "a=runs/x", "/b=/c"]) == {"vqa": "runs/vqa", "a": "runs/x", "c": "/b=/c"}
    assert list(name_models([".", "a/b/"])) == [Path.cwd().name, "b"]
    with pytest.raises(InputError, match="both named vqa: give one another name as NAME=PATH"):
        name_models(["runs/vqa", "other/vqa"])


def test_files_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"\ufeff# one comment\n\n  # another comment\n  {KEY}  \n")
    assert read_keys(path) == [KEY]
    for text, message in (("\n# none\n", "has no API key"), ("short\n", "has 5 characters, expected at least 16")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_keys(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "missing")
