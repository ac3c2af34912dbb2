"""The service as an ASGI application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
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
from blip2.serve.errors import ApiError
from blip2.serve.gate import Gate
from blip2.serve.images import ImageReader
from blip2.serve.metrics import Metrics
from blip2.serve.options import ServeOptions

if TYPE_CHECKING:
    from blip2.search.library import Library

STATIC = Path(__file__).parent / "static"
"""Folder of the web page."""


def create_app(
    pipelines: Mapping[str, RepresentationPipeline | GenerationPipeline],
    library: Library | None = None,
    options: ServeOptions = ServeOptions(),  # noqa: B008  (frozen)
    api_keys: Iterable[str] = (),
) -> FastAPI:
    """Return the service as an application for an ASGI server such as uvicorn.

    Args:
        pipelines: the models by the names under which clients ask for them.
        library: the library of images that ``/v1/search`` searches. None: there is no search.
        options: limits of requests; ``host``, ``port`` and ``api_key_file`` are not used.
        api_keys: keys, one of which each request to ``/v1`` must have. Without keys, everybody may use the service.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield

    app = FastAPI(title="blip2", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, options=options, keys=list(api_keys), metrics=metrics)
    app.state.images = ImageReader(options.max_image_bytes, options.max_image_pixels, options.allow_image_host)
    _add_error_handlers(app)
    created = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether requests will be answered: the models are loaded."""
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
    async def get_model(model: str) -> dict[str, Any]:
        """One of the models."""
        if model not in pipelines:
            raise unknown_model(model, pipelines)
        return _describe(model, pipelines[model], created)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    """Return the error for a model that is not served."""
    return ApiError(
        404,
        f"the model {name[:80]!r} does not exist here: use one of {', '.join(known)}",
        "model",
        "model_not_found",
    )


def _describe(name: str, pipeline: RepresentationPipeline | GenerationPipeline, created: int) -> dict[str, Any]:
    stage1 = isinstance(pipeline, RepresentationPipeline)
    tasks = ["embeddings", "rerank", "attention"] if stage1 else ["chat", "attention"]
    model = Model(id=name, created=created, object="model", owned_by="blip2")
    return {**model.model_dump(exclude_none=True), "stage": pipeline.config.stage, "tasks": tasks}


def _add_error_handlers(app: FastAPI) -> None:
    """Give all errors OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(InputError)
    async def input_error(_: Request, error: InputError) -> Response:
        return ApiError(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        known = {404: "there is no such endpoint: see /openapi.json", 405: "the endpoint has another method"}
        message = known.get(error.status_code, "the request cannot be answered")
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "path", "query"))
        message = f"{where[:200] or 'the body'}: {first['msg'][:300]}"
        return ApiError(400, message, where[:200] or None, "invalid_value").response()
