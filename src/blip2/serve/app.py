"""The service as an ASGI application."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from openai.types import Model
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response

from blip2 import __version__
from blip2.errors import InputError
from blip2.pipelines import GenerationPipeline, RepresentationPipeline
from blip2.search.library import LibraryError
from blip2.serve import attention, chat, page, search, vectors
from blip2.serve.body import describe_problem
from blip2.serve.engine import Engine, LocalEngine
from blip2.serve.errors import ApiError
from blip2.serve.gate import Gate, error_log, read_hosts
from blip2.serve.images import ImageReader
from blip2.serve.metrics import Metrics
from blip2.serve.models import Stage1Model, Stage2Model
from blip2.serve.options import ServeOptions
from blip2.serve.schemas import ErrorResponse
from blip2.serve.service import Service

if TYPE_CHECKING:
    from blip2.search.library import Library

STATIC = Path(__file__).parent / "static"
"""Folder of the web page."""


def create_app(
    pipelines: Mapping[str, RepresentationPipeline | GenerationPipeline],
    library: Library | None = None,
    options: ServeOptions = ServeOptions(),  # noqa: B008  (frozen)
    api_keys: Iterable[str] = (),
    make_engine: Callable[[Metrics], Engine] | None = None,
) -> FastAPI:
    """Return the service as an application for an ASGI server such as uvicorn.

    Args:
        pipelines: the models by the names that clients use.
        library: the library of images that ``/v1/search`` searches. None: there is no search.
        options: limits of requests; ``host``, ``port`` and ``api_key_file`` are not used. Without ``allowed_hosts``,
            requests may have any Host header.
        api_keys: keys, one of which each request to ``/v1`` must have. Without keys, everybody may use the service.
        make_engine: makes the engine that runs the models. None: :class:`~blip2.serve.engine.LocalEngine`.

    Raises:
        InputError: a model does not read images, a host or a network in `options` is invalid, or `api_keys` is a str.
    """
    if isinstance(api_keys, str):  # each of its characters would be a key
        raise InputError("api_keys is a str, expected a list of keys: put the key into a list")
    read_hosts(options.allowed_hosts)  # wrong names are an error now, not at the first request
    images = ImageReader(
        options.max_image_bytes, options.max_image_pixels, options.allow_image_host, options.allow_image_network
    )
    models = {
        name: Stage1Model(name, each) if isinstance(each, RepresentationPipeline) else Stage2Model(name, each)
        for name, each in pipelines.items()
    }
    metrics = Metrics()
    engine = make_engine(metrics) if make_engine else LocalEngine(options.max_batch_size, metrics)
    service = Service(engine, models, images, options, library)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    failed: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in ("4XX", "5XX")}
    app = FastAPI(
        title="blip2", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, responses=failed,
        redirect_slashes=False,  # to an address made of the Host header, to which a client would send its body again
    )  # fmt: skip
    app.add_middleware(Gate, options=options, keys=list(api_keys), metrics=metrics)
    secrets = {str(each.path): name for name, each in pipelines.items()}
    _add_error_handlers(app, secrets | ({} if library is None else {library.uri: "the library"}))
    for module in (chat, vectors, search, attention, page):
        app.include_router(module.make_router(service))
    created = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether requests will be answered: the models are loaded, and their thread runs."""
        if not engine.is_ready():
            raise ApiError(503, "the models are not running: restart the server", code="not_ready")
        return {"status": "ok"}

    @app.get("/metrics", include_in_schema=False)
    async def render_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models, and what each of them can do (``stage``, ``tasks``)."""
        models = [_describe(name, each, created) for name, each in pipelines.items()]
        return {"object": "list", "data": models, "search": library is not None}

    @app.get("/v1/models/{model}")
    async def get_model(model: str, request: Request) -> dict[str, Any]:
        """One of the models."""
        service.find_any(model, request)
        return _describe(model, pipelines[model], created)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _describe(name: str, pipeline: RepresentationPipeline | GenerationPipeline, created: int) -> dict[str, Any]:
    stage1 = isinstance(pipeline, RepresentationPipeline)
    tasks = ["embeddings", "rerank", "attention"] if stage1 else ["chat", "explain", "attention"]
    if pipeline.config.language is not None and not pipeline.config.language.prompt_has_question:
        tasks.append("caption")
    model = Model(id=name, created=created, object="model", owned_by="blip2")
    return {**model.model_dump(exclude_none=True), "stage": pipeline.config.stage, "tasks": tasks}


def _add_error_handlers(app: FastAPI, secrets: Mapping[str, str]) -> None:
    """Give all errors OpenAI's shape.

    Args:
        app: the application.
        secrets: paths of the server that messages of the library may contain, and what is shown instead.
    """

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(InputError)
    async def input_error(_: Request, error: InputError) -> Response:
        message = str(error)
        for secret, shown in secrets.items():
            message = message.replace(secret, shown)
        return ApiError(400, message).response()

    @app.exception_handler(LibraryError)
    async def library_error(_: Request, error: LibraryError) -> Response:
        # LanceDB writes paths of the server in several ways, so its words are for the log alone.
        error_log.error(json.dumps({"event": "error", "type": "LibraryError", "message": str(error)}))
        return ApiError(503, "the library cannot be read at the moment: try again later", code="library").response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        known = {
            400: error.detail,  # of body.py
            404: "there is no such endpoint: see /openapi.json",
            405: "the endpoint has another method: see /openapi.json",
        }
        message = known.get(error.status_code, "the request cannot be answered")
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "").strip() or "missing"
        if not re.match(r"application/([^;\s]+\+)?json\s*(;|$)", kind, re.IGNORECASE):  # FastAPI does not parse it
            return ApiError(
                400,
                f"the Content-Type of the body is {kind[:80]}, expected application/json: set this header",
                code="invalid_value",
            ).response()
        where, reason = describe_problem(error.errors(), error.body)
        return ApiError(400, f"{where or 'the body'}: {reason}", where or None, "invalid_value").response()
