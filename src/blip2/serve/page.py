"""Further endpoints that the web page needs: explanations of answers, and the images of the library."""

from __future__ import annotations

import io
import re
from typing import Annotated, Any

import anyio
from anyio import to_thread
from fastapi import APIRouter, Request
from PIL import Image
from pydantic import Field
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from blip2.config import IMAGE_TOKEN
from blip2.data.images import ImageError, read_image
from blip2.pipelines import Explanation
from blip2.pipelines.results import to_grid
from blip2.search.library import Library
from blip2.serve.body import JSONRoute
from blip2.serve.chat import read_messages, split_content
from blip2.serve.errors import ApiError
from blip2.serve.images import DECODERS
from blip2.serve.models import Stage2Model
from blip2.serve.schemas import Body, Message
from blip2.serve.service import Service
from blip2.serve.tokens import describe_token

MAX_SIDE = 1024
"""Maximum width and height in pixels of an image of the library as it is sent."""
DIGEST = re.compile("[0-9a-f]{32}")


class ExplainRequest(Body):
    """The body of ``POST /v1/explain``."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    """The messages that were answered, as in ``/v1/chat/completions``, with one image, before the first text."""
    token_ids: Annotated[list[int], Field(min_length=1)]
    """The answer: the ``token_ids`` of its choice, which ``return_token_ids`` asks for."""


def make_router(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(route_class=JSONRoute)
    decoders = anyio.CapacityLimiter(DECODERS)

    @router.post("/v1/explain")
    async def explain(body: ExplainRequest, request: Request) -> dict[str, Any]:
        """Explain an answer: for each token, its probability without the image, and the effect of each query on it."""
        model = service.find(body.model, Stage2Model, request)
        num_tokens, limit = len(body.token_ids), service.options.max_tokens
        if num_tokens > limit:
            raise ApiError(
                400, f"the answer has {num_tokens} tokens, expected at most {limit}: shorten it", "token_ids"
            )
        messages = await read_messages(service, model, body.messages)
        [found] = await service.engine.submit(
            lambda requests: [explain_answer(model, *each) for each in requests], [(messages, body.token_ids)]
        )
        return {"model": model.name, **describe(found, model.pipeline.tokenizer, body.token_ids)}

    @router.get("/v1/search/images/{digest}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def library_image(digest: str) -> Response:
        """Return an image of the library by its digest, as a JPEG of at most 1024 x 1024 pixels."""
        data = None
        if service.library is not None and DIGEST.fullmatch(digest):
            data = await to_thread.run_sync(load_image, service.library, digest, limiter=decoders)
        if data is None:
            raise ApiError(404, "there is no such image in the library: use the digest of a result of /v1/search")
        return Response(data, media_type="image/jpeg")

    return router


def explain_answer(model: Stage2Model, messages: list[dict[str, Any]], token_ids: list[int]) -> Explanation:
    """Explain an answer to messages whose images are features; see :meth:`blip2.GenerationPipeline.explain`.

    Raises:
        ApiError: the messages have no image or several, or the image does not come first.
    """
    pipeline = model.pipeline
    parts = [part for each in messages if not isinstance(each["content"], str) for part in each["content"]]
    images, words = split_content(parts)
    if len(images) != 1:
        raise ApiError(400, f"the messages have {len(images)} images, expected one: send one", "messages")
    if len(messages) == 1 and messages[0]["role"] == "user" and not words.strip():
        return pipeline.explain(images[0], token_ids)
    before, image, prompt = pipeline.chat(messages=messages).prompt_text().partition(IMAGE_TOKEN)
    if before.strip() or IMAGE_TOKEN in prompt or not image:
        raise ApiError(
            400, "the image is not at the start of what the LLM reads: put it first, and ask a Q-Former that reads"
            " questions a single question", "messages",
        )  # fmt: skip
    if pipeline.qformer_tokenizer is None:
        return pipeline.explain(images[0], token_ids, prompt)
    return pipeline.explain(images[0], token_ids, question=words)


def describe(found: Explanation, tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> dict[str, Any]:
    """Return an explanation of tokens as JSON. The maps are grids of weights over the image; see ``/v1/attention``."""
    tokens = zip(token_ids, found.token_log_probs, found.blank_log_probs, found.effects.tolist(), strict=True)
    return {
        "tokens": [
            {**describe_token(tokenizer, token), "logprob": log_prob, "blank_logprob": blank, "effects": effects}
            for token, log_prob, blank, effects in tokens
        ],
        "maps": to_grid(found.attention_map).tolist(),
    }


def load_image(library: Library, digest: str) -> bytes | None:
    """Return an image of a library as a small JPEG without metadata; None if it cannot be read, or has changed."""
    try:
        data = library.read_image_by_digest(digest)
        if data is None:
            return None
        image = read_image(data, f"image {digest}")
    except ImageError:
        return None
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
