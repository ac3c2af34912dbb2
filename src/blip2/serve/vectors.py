"""``POST /v1/embeddings`` and ``POST /v1/rerank``: stage-1 models as embedders and rankers of texts and images."""

from __future__ import annotations

import base64
import uuid
from typing import Any

import torch
from anyio import to_thread
from fastapi import APIRouter, Request
from jaxtyping import Float
from openai.types import CreateEmbeddingResponse
from starlette.responses import JSONResponse, Response
from torch import Tensor
from torch.nn import functional as F

from blip2.serve.body import JSONRoute
from blip2.serve.errors import ApiError
from blip2.serve.models import Stage1Model, check_length, itc
from blip2.serve.schemas import EmbeddingRequest, Item, RerankRequest
from blip2.serve.service import Service, image_url, text_of


def make_router(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(route_class=JSONRoute)

    @router.post("/v1/embeddings", responses={200: {"model": CreateEmbeddingResponse}})
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts and images in one space. An image is the normalized mean of the vectors of its queries."""
        model = service.find(body.model, Stage1Model, request)
        items = body.input if isinstance(body.input, list) else [body.input]
        embedded = await _embed(service, model, items, "input")
        data: list[dict[str, Any]] = []
        for index, vectors in enumerate(embedded.vectors):
            mean = vectors if vectors.ndim == 1 else F.normalize(vectors.mean(dim=0), dim=0)
            entry = {"object": "embedding", "index": index, "embedding": _encode(mean, body.encoding_format)}
            if body.multivector:
                entry["vectors"] = torch.atleast_2d(vectors).tolist()
            data.append(entry)
        usage = {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})

    @router.post("/v1/rerank")
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Order documents by how well they match the query, in the shape of Jina and Cohere.

        The relevance of a text and an image is the probability that they match (ITM), that of two images their
        similarity (ITC).
        """
        model = service.find(body.model, Stage1Model, request)
        items = [body.query, *body.documents]
        both = next((i for i, each in enumerate(items[1:]) if image_url(each) is None), None)
        if image_url(body.query) is None and both is not None:
            raise ApiError(
                400,
                f"the query and document {both} are texts, expected at least one image: this model compares images"
                " with texts and with images",
                "documents",
            )
        embedded = await _embed(service, model, items, "documents")
        pairs: list[tuple[int, Tensor, str]] = []
        for number in range(1, len(items)):
            texts = [embedded.texts[each] for each in (0, number)]
            images = [embedded.features[each] for each in (0, number)]
            text, image = texts[0] or texts[1], images[0] if images[1] is None else images[1]
            if text is not None and image is not None:
                pairs.append((number, image, text))
        matches = await service.engine.submit(model.match, [(image, text) for _, image, text in pairs])
        itm = dict(zip((number for number, _, _ in pairs), matches, strict=True))
        results: list[dict[str, Any]] = []
        for number in range(1, len(items)):
            similarity = itc(embedded.vectors[0], embedded.vectors[number])
            score = itm.get(number)
            result = {
                "index": number - 1,
                "relevance_score": similarity if score is None else score,
                "itc": similarity,
                "itm": score,
            }
            if body.return_documents and embedded.texts[number] is not None:
                result["document"] = {"text": embedded.texts[number]}
            results.append(result)
        results.sort(key=lambda result: -result["relevance_score"])
        return JSONResponse(
            {
                "id": f"rerank-{uuid.uuid4().hex}",
                "object": "list",
                "model": model.name,
                "results": results[: body.top_n],
                "usage": {"total_tokens": embedded.num_tokens},
                "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
            }
        )

    return router


class _Embedded:
    """Texts and images with their vectors."""

    def __init__(self, num_items: int) -> None:
        self.texts: list[str | None] = [None] * num_items
        self.features: list[Float[Tensor, "P E"] | None] = [None] * num_items
        self.vectors: list[Tensor] = [torch.empty(0)] * num_items
        """[C] for a text, [Q, C] for an image."""
        self.num_tokens = 0
        """Number of tokens of the texts and of queries of the images."""


async def _embed(service: Service, model: Stage1Model, items: list[Item], param: str) -> _Embedded:
    embedded = _Embedded(len(items))
    embedded.texts = [text_of(item, param) for item in items]
    urls = {number: url for number, item in enumerate(items) if (url := image_url(item)) is not None}
    features = await service.encode(model, list(urls.values()), param)
    for number, each in zip(urls, features, strict=True):
        embedded.features[number] = each
    texts = {number: text for number, text in enumerate(embedded.texts) if text is not None}

    def count_tokens() -> int:
        return sum(check_length(model.pipeline, text, param) for text in texts.values())

    num_tokens = await to_thread.run_sync(count_tokens)  # takes seconds for megabytes of text
    vectors = await service.engine.submit(model.embed_texts, list(texts.values()))
    vectors += await service.engine.submit(model.embed_images, features)
    for number, each in zip((*texts, *urls), vectors, strict=True):
        embedded.vectors[number] = each
    embedded.num_tokens = num_tokens + len(urls) * model.num_query_tokens
    return embedded


def _encode(vector: Float[Tensor, "C"], form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()
