"""``POST /v1/search``: search in a library of images."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastapi import APIRouter
from jaxtyping import Float
from starlette.responses import JSONResponse, Response
from torch import Tensor

from blip2.data.images import preprocess
from blip2.search.library import Hit, Library, sql_text
from blip2.serve.body import JSONRoute
from blip2.serve.errors import ApiError
from blip2.serve.models import check_length
from blip2.serve.schemas import Condition, SearchRequest, Value
from blip2.serve.service import Service, image_url, text_of

OPERATORS = {"eq": "=", "ne": "!=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class _Query(NamedTuple):
    query: str | Float[Tensor, "3 H W"]
    """A text, or a preprocessed image, which takes less memory than a photo while it waits."""
    k: int
    where: str | None
    rerank_k: int


def make_router(service: Service) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter(route_class=JSONRoute)

    def search(queries: list[_Query]) -> list[list[Hit]]:
        library = service.library
        assert library is not None
        return [
            library.search(*each)
            if isinstance(each.query, str)
            else library.search_vectors(
                library.pipeline.embed_images(library.pipeline.encode_pixels(each.query[None]))[0],
                each.k, each.where, each.rerank_k,
            )
            for each in queries
        ]  # fmt: skip

    @router.post("/v1/search")
    async def find(body: SearchRequest) -> Response:
        """Search the library with words or with an image: a shortlist by ITC, re-ranked by ITM."""
        library = _library(service)
        where = make_condition(library, body)
        url = image_url(body.query)
        query = (
            text_of(body.query, "query")
            if url is None
            else await service.images.read(
                url, lambda image: preprocess(image, library.pipeline.model.vision.preprocessing)
            )
        )
        assert query is not None
        if isinstance(query, str):
            check_length(library.pipeline, query, "query")
        [hits] = await service.engine.submit(search, [_Query(query, body.top_k, where, body.rerank_k)])
        return JSONResponse({"object": "list", "data": [_describe(hit) for hit in hits]})

    return router


def _library(service: Service) -> Library:
    if service.library is None:
        raise ApiError(404, "this server has no library: start it with --library", code="no_library")
    return service.library


def _describe(hit: Hit) -> dict[str, Any]:
    """Return a hit without its path."""
    return {
        "id": hit.digest,
        "itc": hit.similarity,
        "itm": hit.match,
        "url": f"/v1/search/images/{hit.digest}",
        "captions": list(hit.captions),
        "metadata": {name: _plain(value) for name, value in hit.metadata.items()},
        "num_duplicates": len(hit.duplicates),
    }


def _plain(value: Any) -> Any:
    """Return a value of a column as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def make_condition(library: Library, body: SearchRequest) -> str | None:
    """Return the filter of a search as SQL. Nothing of the request gets into it but names of columns and literals.

    Raises:
        ApiError: the library has no such column, or a condition is empty.
    """
    if not body.filter:
        return None
    columns = library.columns
    parts: list[str] = []
    for name, wanted in body.filter.items():
        if name not in columns or "`" in name:
            known = ", ".join(columns) or "none"
            raise ApiError(
                400, f"the library has no column {name[:80]!r}, expected one of: {known}", f"filter.{name[:80]}"
            )
        column = f"`{name}`"
        if isinstance(wanted, list):
            if not wanted:
                raise ApiError(400, f"the list for {name} is empty: give at least one value", f"filter.{name[:80]}")
            parts.append(f"{column} IN ({', '.join(map(_literal, wanted))})")
        elif isinstance(wanted, Condition):
            given = wanted.model_dump(exclude_none=True)
            if not given:
                raise ApiError(400, f"the condition on {name} is empty: give a value", f"filter.{name[:80]}")
            parts += [f"{column} {OPERATORS[operator]} {_literal(value)}" for operator, value in given.items()]
        else:
            parts.append(f"{column} = {_literal(wanted)}")
    return " AND ".join(parts)


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return sql_text(value) if isinstance(value, str) else repr(value)
