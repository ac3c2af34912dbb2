"""Run the service with uvicorn."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from blip2.config import Precision
from blip2.errors import InputError
from blip2.pipelines import GenerationPipeline, RepresentationPipeline, load
from blip2.search.library import Library, OtherModelError
from blip2.serve.app import create_app
from blip2.serve.engine import Engine
from blip2.serve.metrics import Metrics
from blip2.serve.options import ServeOptions
from blip2.serve.protocol import HttpProtocol


def serve(
    models: Sequence[str],
    library: str | None = None,
    options: ServeOptions = ServeOptions(),  # noqa: B008  (frozen)
    device: str | None = None,
    dtype: Precision | None = None,
) -> None:
    """Serve models until the process is asked to end (SIGTERM, Ctrl-C); requests that have begun are then answered.

    Args:
        models: checkpoints, as ``PATH`` or ``NAME=PATH``. The default name is the last part of the path.
        library: folder or URI of a library of images to search. None: there is no search.
        options: where the service listens, and its limits.
        device, dtype: how the models are loaded; see :func:`blip2.load`.

    Raises:
        InputError: a model or the library cannot be loaded, two models have the same name, or there are no keys in
            the file of API keys.
    """
    options = replace(options, allowed_hosts=options.allowed_hosts or default_hosts(options.host))
    keys = [] if options.api_key_file is None else read_keys(options.api_key_file)
    paths = name_models(models)
    pipelines: dict[str, RepresentationPipeline | GenerationPipeline] = {}
    for name, path in paths.items():
        pipeline = pipelines[name] = load(path, device, dtype)
        if isinstance(pipeline, GenerationPipeline):
            _ = pipeline.model.language.shares_prompts  # tests the LLM now, so that the first request does not wait
    make_engine = None if options.vllm_url is None else find_vllm(pipelines, options)
    run(create_app(pipelines, open_library(library, pipelines, device, dtype), options, keys, make_engine), options)


def run(app: FastAPI, options: ServeOptions) -> None:
    """Run an application until the process is asked to end.

    Raises:
        InputError: the address or the port cannot be used.
    """
    AppStatus.disable_automatic_graceful_drain()  # a stream that has begun is written to its end
    for logger in ("blip2.serve", "blip2.serve.access"):
        logging.getLogger(logger).setLevel(logging.INFO)
    # Headers about the client that a proxy sets are not read: nothing depends on them.
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=HttpProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
    )
    server = _Server(config)
    # After its end, uvicorn raises the signal again that it got. SIGTERM is how a service is meant to end: status 0.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with contextlib.suppress(SystemExit):  # if it cannot listen, for a reason that uvicorn has logged
            server.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    if not server.started:
        raise InputError(
            f"the service cannot listen on {options.host}, port {options.port}: give another --host or --port"
        )


class _Server(uvicorn.Server):
    """A server that prints its address to the standard error."""

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        for server in getattr(self, "servers", []):
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)


def default_hosts(host: str) -> list[str]:
    """Return the names that requests to a server may use, by the address on which it listens. An empty list: any name.

    A server on a loopback address is only reached under the names of its own machine, unless there is a proxy before
    it, or a page of another site lets its name resolve to this address.
    """
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return []
    own = f"[{host}]" if ":" in host else host
    return list(dict.fromkeys(["localhost", "127.0.0.1", "[::1]", own])) if is_loopback else []


def find_vllm(
    pipelines: Mapping[str, RepresentationPipeline | GenerationPipeline], options: ServeOptions
) -> Callable[[Metrics], Engine]:
    """Return the function that makes an engine with vLLM.

    Raises:
        InputError: there is not exactly one stage-2 model, or its LLM is an encoder-decoder.
    """
    from blip2.serve.vllm import VllmEngine, check_decoder_only

    stage2 = [each for each in pipelines.values() if isinstance(each, GenerationPipeline)]
    if len(stage2) != 1:
        raise InputError(
            f"--vllm-url needs exactly one stage-2 model, found {len(stage2)}: give one, and run a server for each"
        )
    [pipeline] = stage2
    check_decoder_only(pipeline)
    assert options.vllm_url is not None and pipeline.config.language is not None
    url, name = options.vllm_url, options.vllm_model or pipeline.config.language.name
    return lambda metrics: VllmEngine(url, name, options.max_batch_size, metrics)


def name_models(models: Sequence[str]) -> dict[str, str]:
    """Return the path of each model by its name.

    Raises:
        InputError: two models have the same name.
    """
    paths: dict[str, str] = {}
    for each in models:
        name, equals, path = each.partition("=")
        if not equals or "/" in name:
            name, path = Path(each).absolute().name, each
        if name in paths:
            raise InputError(
                f"the models {paths[name]} and {path} are both named {name}: give one another name as NAME=PATH"
            )
        paths[name] = path
    return paths


def read_keys(path: Path) -> list[str]:
    """Return the API keys in a file, one per line; lines that begin with # are comments.

    Raises:
        InputError: the file cannot be read or has no key, or a key has fewer than 16 characters.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        raise InputError(f"the API keys in {path} cannot be read ({error}): check the file") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InputError(f"{path} has no API key: write one per line, or leave out --api-key-file")
    if short := next((key for key in keys if len(key) < 16), None):
        raise InputError(
            f"an API key in {path} has {len(short)} characters, expected at least 16: make longer ones, for example"
            " with openssl rand -hex 32"
        )
    return keys


def open_library(
    uri: str | None,
    pipelines: Mapping[str, RepresentationPipeline | GenerationPipeline],
    device: str | None,
    dtype: Precision | None,
) -> Library | None:
    """Open a library with the served model that made it, or else load that model. None without `uri`."""
    if uri is None:
        return None
    for pipeline in pipelines.values():
        if isinstance(pipeline, RepresentationPipeline):
            with contextlib.suppress(OtherModelError):
                return Library.open(uri, pipeline)
    library = Library.open(uri, device=device, dtype=dtype)
    _ = library.pipeline  # so that the first search does not wait for it
    return library
