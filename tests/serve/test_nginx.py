"""The service behind nginx, with the lines of docs/serving.md."""

import shutil
import socket
import subprocess
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from blip2.serve.app import create_app
from blip2.serve.options import ServeOptions
from conftest import draw
from fixtures.service import LONG, PausingEngine, build_writer, data_url, serve

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@contextmanager
def nginx(folder, port):
    """nginx before the service on `port`; gives the port on which nginx listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = free.getsockname()[1]
    text = PAGE.read_text()
    start = text.index("    location / {")
    lines = textwrap.dedent(text[start : text.index("\n\n", start)]).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config, errors, pid = folder / "nginx.conf", folder / "error.log", folder / "pid"
    config.write_text(
        f"user root; daemon off; pid {pid}; error_log {errors}; events {{}} http {{ access_log off; {places}"
        f" server {{ listen 127.0.0.1:{own}; {lines} }} }}"
    )
    process = subprocess.Popen([NGINX, "-c", config, "-e", errors])
    try:
        while not pid.exists():  # which it writes once it listens
            assert process.poll() is None, errors.read_text()
            time.sleep(0.01)
        yield own
    finally:
        process.terminate()
        process.wait(30)


def test_nginx_before_the_service(parts, tmp_path):
    options = ServeOptions(allowed_hosts=["127.0.0.1"])
    go_on = threading.Event()
    engine = lambda metrics: PausingEngine(go_on, 4, metrics)  # noqa: E731
    app = create_app({"writer": build_writer(parts)}, None, options, (), engine)
    image = {"type": "image_url", "image_url": {"url": data_url(draw("disc", "red", 0))}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "what is it"}]}]
    with serve(app) as port, nginx(tmp_path, port) as front:
        url = f"http://127.0.0.1:{front}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30)
        asked = {"model": "writer", "messages": messages, "max_tokens": LONG}
        text = ""
        for chunk in client.chat.completions.create(**asked, stream=True):
            text += chunk.choices[0].delta.content or ""
            if text:  # it has arrived, although the answer goes on only now
                go_on.set()
        assert text == client.chat.completions.create(**asked).choices[0].message.content and len(text) > 5
        client.close()
        errors = httpx2.post(f"{url}/chat/completions", json={**asked, "wrong": 1})
        assert errors.status_code == 400 and errors.json()["error"]["param"] == "wrong"  # the server's own
        body = b"[" + b" " * (options.max_body_bytes - 1)
        assert httpx2.post(f"{url}/chat/completions", content=body).status_code == 400  # read by the server
        for content in (body + b" ", iter([body, b"  "])):
            response = httpx2.post(f"{url}/chat/completions", content=content)
            assert response.status_code == 413 and response.headers["Content-Type"] == "application/json"
            assert response.json()["error"]["code"] == "body_too_large"
