"""The service under load: requests per second, latencies and the time to the first token, with batching and without.

    python benchmarks/serve.py runs/demo/vqa            # the whole table, with 2,000 requests whose answers are known
    python benchmarks/serve.py runs/demo/vqa --peer     # also `transformers serve`, for comparison
    python benchmarks/serve.py runs/demo/vqa --quick    # a few requests: does it run?

Each row is a server of its own and a number of clients, each of which sends its next request when it has the answer to
the last one. A request has an image of its own and one of five questions, and its answer is known from the server
without batches, asked by one client: a request that is lost, or has another answer, is counted. In bf16, a batch may
round differently and change a word that was almost as likely as another; with --dtype fp32 no answer may change.

``--peer`` makes a BLIP-2 in transformers' format with a small untrained ViT, MiniLM as the Q-Former and the LLM
SmolLM2-135M-Instruct, and lets both servers caption the same images with it, with the same number of tokens. The median
of the ratio over ``--rounds`` rounds is printed, in which the servers take turns.

The result is written to ``--output`` as JSON, and printed as a table.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image, ImageDraw

QUESTIONS = (
    "What color is it?", "What shape is it?", "How many things are there?", "What is on the left?", "What is this?",
)  # fmt: skip
COLORS = ("red", "green", "blue", "yellow", "black", "orange", "purple", "white")
MODEL = "model"
FIRST_TOKEN, NEVER_WRITTEN = "<|im_start|>", 7
"""Of SmolLM2: the token that begins a text, and the id of one that stands for metadata of code (``<gh_stars>``)."""


# -- requests ----------------------------------------------------------------------------------------------------------


def draw(number: int) -> str:
    """Return the data URL of an image of a few shapes; every number gives another one."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (224, 224), tuple(int(each) for each in rng.integers(150, 256, 3)))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 5))):
        x, y, size = (int(each) for each in rng.integers((0, 0, 20), (180, 180, 90)))
        shape = pen.ellipse if rng.integers(2) else pen.rectangle
        shape((x, y, x + size, y + size), fill=COLORS[rng.integers(len(COLORS))])
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def make_request(number: int, max_tokens: int, caption: bool, model: str = MODEL) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": draw(number)}}]
    if not caption:
        content.append({"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]})
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    return {**body, "temperature": 0}


@dataclass
class Load:
    """What clients saw."""

    seconds: float
    latencies: list[float]
    """Seconds of each request."""
    first_tokens: list[float]
    """Seconds to the first piece of text of each streamed request."""
    answers: list[str | None]
    """The answer to each request; None if it has none."""

    def row(self) -> dict[str, float]:
        def percentile(values: Sequence[float], percent: int) -> float:
            return round(float(np.percentile(values, percent)), 4) if values else float("nan")

        return {
            "requests_per_second": round(len(self.answers) / self.seconds, 3),
            **{f"p{percent}": percentile(self.latencies, percent) for percent in (50, 95, 99)},
            "first_token_p50": percentile(self.first_tokens, 50),
            "first_token_p95": percentile(self.first_tokens, 95),
        }


async def ask(url: str, requests: Sequence[dict[str, Any]], clients: int, stream: bool) -> Load:
    """Send requests from so many clients, and return what they saw."""
    load = Load(0.0, [], [], [None] * len(requests))
    places = iter(range(len(requests)))
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as http:

        async def client() -> None:
            for place in places:
                started = time.perf_counter()
                with suppress(httpx2.TransportError):  # the request is lost
                    load.answers[place] = await (_stream if stream else _send)(http, requests[place], load, started)
                load.latencies.append(time.perf_counter() - started)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        load.seconds = time.perf_counter() - started
    return load


async def _send(http: httpx2.AsyncClient, body: dict[str, Any], load: Load, started: float) -> str | None:
    response = await http.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        print(f"{response.status_code}: {response.text[:200]}", file=sys.stderr)
        return None
    return response.json()["choices"][0]["message"]["content"]


async def _stream(http: httpx2.AsyncClient, body: dict[str, Any], load: Load, started: float) -> str | None:
    pieces: list[str] = []
    async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return None
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:]).get("choices") or [{}]
            if piece := choices[0].get("delta", {}).get("content"):
                if not pieces:
                    load.first_tokens.append(time.perf_counter() - started)
                pieces.append(piece)
    return "".join(pieces)


# -- servers -----------------------------------------------------------------------------------------------------------


@contextmanager
def run_server(command: Sequence[str | Path], ready: str | None = None) -> Iterator[str]:
    """Run a server; gives its URL.

    Args:
        command: the program and its arguments.
        ready: the URL that answers when the server is ready. None: the server prints where it listens.
    """
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([str(each) for each in command], stdout=log, stderr=log, env=environment)
        try:
            yield _wait(process, log, ready)
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], log: Any, ready: str | None) -> str:
    for _ in range(6000):
        log.seek(0)
        text = log.read()
        if process.poll() is not None:
            raise SystemExit(f"the server ended:\n{text[-2000:]}")
        if ready is None:
            if found := re.search(r"listening on (http://\S+)", text):
                return found[1]
        else:
            with suppress(httpx2.TransportError):
                httpx2.get(ready, timeout=5, trust_env=False)
                return ready.rsplit("/", 1)[0]
        time.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"the server is not ready:\n{log.read()[-2000:]}")


def ours(model: str | Path, max_batch_size: int, dtype: str | None = None) -> list[str | Path]:
    command: list[str | Path] = [sys.executable, "-m", "blip2", "serve", f"{MODEL}={model}", "--port", "0"]
    command += ["--dtype", dtype] if dtype is not None else []
    return [*command, "--max-batch-size", str(max_batch_size), "--max-queue", "1000", "--deadline", "600"]


def warm_up(url: str, requests: Sequence[dict[str, Any]]) -> None:
    asyncio.run(ask(url, requests[:2], 1, stream=False))


# -- the table ---------------------------------------------------------------------------------------------------------


def measure_load(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the service with batching and without, and check every answer."""
    requests = [make_request(number, options.tokens, caption=False) for number in range(options.known)]
    rows: list[dict[str, Any]] = []
    expected: list[str | None] = []
    for size in (1, options.max_batch_size):
        with run_server(ours(options.model, size, options.dtype)) as url:
            warm_up(url, requests)
            for clients in options.clients:
                # The answers of the server without batches to one client are what all the others are compared with.
                is_reference = size == 1 and clients == options.clients[0]
                is_check = size > 1 and clients == options.clients[-1]
                part = requests if is_reference or is_check else requests[: options.requests]
                load = asyncio.run(ask(url, part, 1 if is_reference else clients, stream=False))
                expected = load.answers if is_reference else expected
                streamed = asyncio.run(ask(url, part[: options.requests], clients, stream=True))
                load.first_tokens = streamed.first_tokens
                row = {
                    "max_batch_size": size, "clients": clients, "requests": len(part), **load.row(),
                    "lost": sum(answer is None for answer in (*load.answers, *streamed.answers)),
                    "wrong": sum(
                        found is not None and found != wanted
                        for answers in (load.answers, streamed.answers)
                        for found, wanted in zip(answers, expected, strict=False)
                    ),
                    "different_answers": len(set(expected)),
                }  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def make_peer_folder(folder: Path) -> Path:
    """Write a BLIP-2 in transformers' format that both servers can load, and return its folder."""
    import torch
    from transformers import ViTConfig, ViTModel

    from blip2.builder import build
    from blip2.checkpoint import save_checkpoint
    from blip2.config import DataConfig, LanguageConfig, QFormerConfig, Recipe, VisionConfig
    from blip2.convert import convert

    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-5
    )
    ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "vit")
    recipe = Recipe(
        stage="generation",
        output=str(folder / "run"),
        vision=VisionConfig(str(folder / "vit")),
        language=LanguageConfig("package:smollm2-135m-instruct"),
        qformer=QFormerConfig(
            bert="package:minilm", hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
            num_query_tokens=16,
        ),
        data=DataConfig(train="none"),
    )  # fmt: skip
    built = build(recipe.model, torch.device("cpu"))
    save_checkpoint(folder / "run", 1, built.model, recipe, built.tokenizer, {}, {}, 1)
    convert(str(folder / "run"), str(folder / "blip2"), "transformers", {}, None, True, None)
    never_end(folder / "blip2")
    return folder / "blip2"


def never_end(folder: Path) -> None:
    """Let a token that the LLM does not write end a text, so that all texts have the maximum number of tokens.

    Greedy search is made the default as well: BLIP-2's is beam search, which transformers would use.
    """
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.get("text_config", settings)["eos_token_id"] = NEVER_WRITTEN
        if "num_beams" in settings:
            settings["num_beams"] = 1
        (folder / name).write_text(json.dumps(settings, indent=1))


def measure_peer(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure this service and `transformers serve` by turns, with the same model, images and number of tokens."""
    model = make_peer_folder(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    theirs = [Path(sys.executable).parent / "transformers", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    # transformers' processor of BLIP-2 drops the chat template of its folder. A caption continues the first token.
    template = json.dumps({"chat_template": FIRST_TOKEN})
    theirs += ["--device", "cpu", "--dtype", "float32", "--chat-template-kwargs", template]
    sides: dict[str, list[Load]] = {"ours": [], "transformers": []}
    with (
        run_server(ours(model, options.max_batch_size)) as our_url,
        run_server(theirs, f"http://127.0.0.1:{port}/health") as their_url,
    ):
        for name, url in (("ours", our_url), ("transformers", their_url)):
            warm_up(url, [make_request(0, 2, caption=True, model=MODEL if name == "ours" else str(model))])
        for _ in range(options.rounds):
            for name, url in (("ours", our_url), ("transformers", their_url)):
                called = MODEL if name == "ours" else str(model)
                requests = [
                    make_request(number, options.tokens, caption=True, model=called)
                    for number in range(options.requests)
                ]
                sides[name].append(asyncio.run(ask(url, requests, options.peer_clients, stream=False)))
    ratios = [theirs.seconds / ours.seconds for ours, theirs in zip(*sides.values(), strict=True)]
    first = {name: loads[0].answers for name, loads in sides.items()}
    return {
        "clients": options.peer_clients,
        "requests": options.requests,
        "tokens": options.tokens,
        **{name: [load.row() for load in loads] for name, loads in sides.items()},
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "lost": sum(answer is None for loads in sides.values() for load in loads for answer in load.answers),
        "equal_answers": sum((a or "").strip() == (b or "").strip() for a, b in zip(*first.values(), strict=True)),
    }


def to_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table for docs/serving.md."""
    lines = ["| batches of | clients | requests/s | p50 | p95 | p99 | first token p50 | lost | wrong |"]
    lines.append("|---:" * 9 + "|")
    for row in rows:
        times = [f"{row[key]:.2f} s" for key in ("p50", "p95", "p99", "first_token_p50")]
        cells = [row["max_batch_size"], row["clients"], f"{row['requests_per_second']:.2f}", *times]
        lines.append("| " + " | ".join(map(str, [*cells, row["lost"], f"{row['wrong']} of {row['requests']}"])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run or a checkpoint of stage 2")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200, help="requests of each row")
    parser.add_argument("--known", type=int, default=2000, help="requests of the rows that check all answers")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer, at most")
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--dtype", help="of blip2 serve (default: that of the checkpoint)")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--peer-clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few requests: whether it runs, not how fast")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.clients = sorted({1, *options.clients})  # one client is what the others are compared with
    if options.quick:
        options.clients, options.requests, options.known, options.tokens, options.rounds = [1, 4], 4, 8, 4, 1
    result: dict[str, Any] = {"threads": os.environ.get("OMP_NUM_THREADS"), "rows": measure_load(options)}
    if options.peer:
        with tempfile.TemporaryDirectory() as folder:
            result["peer"] = measure_peer(options, Path(folder))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(to_table(result["rows"]))
    if "peer" in result:
        print(json.dumps(result["peer"], indent=1))


if __name__ == "__main__":
    main()
