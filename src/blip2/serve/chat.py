"""``POST /v1/chat/completions``: chat about images, caption them, or choose an answer."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from sse_starlette import EventSourceResponse
from starlette.responses import JSONResponse, Response

from blip2.data.collate import check_unicode
from blip2.decoding.options import CAPTION_DECODING, CHAT_DECODING, Decoding
from blip2.pipelines import Candidate
from blip2.serve.body import JSONRoute
from blip2.serve.engine import Generation, Piece
from blip2.serve.errors import ApiError
from blip2.serve.models import Conversation, Stage2Model, count_tokens
from blip2.serve.schemas import ChatRequest, ImagePart, Message, ResponseFormat, TextPart
from blip2.serve.service import Service

MIN_TEMPERATURE = 0.01
"""Temperatures below this value select greedy search."""
MAX_CHOICES = 1000
"""Maximum number of texts of a fixed choice."""


class _Reply(NamedTuple):
    """The fields that are the same in all chunks of an answer."""

    id: str
    model: str
    created: int


def make_router(service: Service) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter(route_class=JSONRoute)

    @router.post("/v1/chat/completions", responses={200: {"model": ChatCompletion}})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation about images; see OpenAI's API reference."""
        model = service.find(body.model, Stage2Model, request)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "found top_logprobs without logprobs: set logprobs to true", "top_logprobs")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "found stream_options without stream: set stream to true", "stream_options")
        reply = _Reply(f"chatcmpl-{uuid.uuid4().hex}", model.name, int(time.time()))
        choices = _choices(body.response_format)
        if choices is not None:
            return await _choose(service, model, body, choices, reply, request)
        generation, num_tokens = await _prepare(service, model, body)
        if body.stream:
            return EventSourceResponse(_events(service, generation, body, reply, num_tokens, request), ping=15)
        return await _complete(service, generation, body, reply, num_tokens, request)

    return router


# -- the request -------------------------------------------------------------------------------------------------------


async def _prepare(service: Service, model: Stage2Model, body: ChatRequest) -> tuple[Generation, int]:
    """Return what is to be generated, and the number of tokens of the prompt."""
    service.engine.check_n(body.n or 1)
    messages = await read_messages(service, model, body.messages)
    caption = _image_alone(messages)
    decoding = _decoding(body, service.options.max_tokens, CAPTION_DECODING if caption is not None else CHAT_DECODING)
    if caption is not None:
        [prompt] = await service.engine.submit(model.caption_prompts, [(caption, decoding)])
    else:
        [prompt] = await service.engine.submit(model.chat_prompts, [Conversation(messages, decoding)])
    num_alternatives = (body.top_logprobs or 0) if body.logprobs else None
    generation = Generation(model.pipeline, prompt, decoding, body.n or 1, body.seed, num_alternatives)
    return generation, prompt.visual_prompts.shape[1] + int(prompt.attention_mask.sum())


async def read_messages(service: Service, model: Stage2Model, messages: list[Message]) -> list[dict[str, Any]]:
    """Return messages in the form of :meth:`blip2.GenerationPipeline.chat`, with features in the place of images."""
    urls = [part.image_url.url for each in messages for part in each.content if isinstance(part, ImagePart)]
    features = iter(await service.encode(model, urls, "messages"))
    roles = {"developer": "system"}
    return [
        {
            "role": roles.get(message.role, message.role),
            "content": message.content
            if isinstance(message.content, str)
            else [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": next(features)[None]}
                for part in message.content
            ],
        }
        for message in messages
    ]


def _image_alone(messages: list[dict[str, Any]]) -> Any:
    """Return the features of the image if the messages are one image without words, else None."""
    if len(messages) != 1 or messages[0]["role"] != "user" or isinstance(messages[0]["content"], str):
        return None
    images, words = split_content(messages[0]["content"])
    return images[0][0] if len(images) == 1 and not words.strip() else None


def split_content(parts: Sequence[Mapping[str, Any]]) -> tuple[list[Any], str]:
    """Return the images of a message, as features [1, P, E], and its joined texts."""
    images = [part["image"] for part in parts if part["type"] == "image"]
    return images, "".join(part["text"] for part in parts if part["type"] == "text")


def _decoding(body: ChatRequest, limit: int, default: Decoding) -> Decoding:
    """Return the options of generation in a request."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(
            400, "found both max_tokens and max_completion_tokens: leave out max_tokens", "max_completion_tokens"
        )
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if asked is not None and asked > limit:
        raise ApiError(400, f"{asked} tokens are requested, expected at most {limit}: request fewer", "max_tokens")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    samples = (body.top_p is not None) if body.temperature is None else body.temperature >= MIN_TEMPERATURE
    return Decoding(
        num_beams=1,
        max_new_tokens=asked or min(default.max_new_tokens, limit),
        top_p=(body.top_p or 1.0) if samples else None,
        temperature=(body.temperature or 1.0) if samples else 1.0,
        stop_strings=tuple(stop) if stop else None,
    )


def _choices(response_format: ResponseFormat | None) -> tuple[str | None, tuple[str, ...]] | None:
    """Return the texts of a fixed choice, and the name of the property that has them; None for free text."""
    if response_format is None or response_format.type == "text":
        return None
    schema: Mapping[str, Any] = {} if response_format.json_schema is None else response_format.json_schema.schema_
    name: str | None = None
    if schema.get("type") == "object":
        properties = schema.get("properties")
        if isinstance(properties, dict) and len(properties) == 1:
            [(name, schema)] = properties.items()
    texts = schema.get("enum") if isinstance(schema, dict) else None
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_CHOICES or not all(
        isinstance(each, str) and each.strip() for each in texts
    ) or len(set(texts)) < len(texts):  # fmt: skip
        raise ApiError(
            400,
            f"the JSON schema is not a fixed choice, expected an enum of 1 to {MAX_CHOICES} different texts, or an"
            " object whose only property has one: change the schema",
            "response_format",
            "unsupported_schema",
        )
    check_unicode(texts if name is None else [name, *texts])
    return name, tuple(texts)


# -- the answer --------------------------------------------------------------------------------------------------------


async def _complete(
    service: Service, generation: Generation, body: ChatRequest, reply: _Reply, num_tokens: int, request: Request
) -> Response:
    """Answer with the whole texts."""
    pieces: list[list[Piece]] = [[] for _ in range(generation.n)]
    async with aclosing(service.engine.stream(generation)) as stream:
        async for piece in stream:
            pieces[piece.index].append(piece)
    tokens = [[token for piece in each for token in piece.token_ids] for each in pieces]
    choices = [
        Choice(
            index=index,
            message=ChatCompletionMessage(
                role="assistant", content="".join(piece.text for piece in each), refusal=None
            ),
            finish_reason=each[-1].finish_reason or "stop",
            logprobs=ChoiceLogprobs(content=[one for piece in each for one in piece.log_probs], refusal=None)
            if body.logprobs
            else None,
            **_more(body, token_ids),
        )
        for index, (each, token_ids) in enumerate(zip(pieces, tokens, strict=True))
    ]
    usage = _usage(num_tokens, sum(map(len, tokens)), request)
    return _respond(reply, choices, usage)


def _more(body: ChatRequest, token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the field of a choice that OpenAI's API does not have, if the request asks for it."""
    return {"token_ids": token_ids} if body.return_token_ids else {}


def _respond(reply: _Reply, choices: list[Choice], usage: CompletionUsage) -> Response:
    completion = ChatCompletion(**reply._asdict(), object="chat.completion", choices=choices, usage=usage)
    return JSONResponse(completion.model_dump(mode="json", exclude_unset=True))


async def _events(
    service: Service, generation: Generation, body: ChatRequest, reply: _Reply, num_tokens: int, request: Request
) -> AsyncIterator[dict[str, str]]:
    """Yield the events of a streamed answer."""
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    count = 0

    def chunk(choices: list[ChunkChoice], usage: CompletionUsage | None = None) -> dict[str, str]:
        made = ChatCompletionChunk(**reply._asdict(), object="chat.completion.chunk", choices=choices)
        if wants_usage:
            made.usage = usage
        return {"data": made.model_dump_json(exclude_unset=True)}

    for index in range(generation.n):
        delta = ChoiceDelta(role="assistant", content="")
        yield chunk([ChunkChoice(index=index, delta=delta, finish_reason=None)])
    try:
        async with aclosing(service.engine.stream(generation)) as stream:
            async for piece in stream:
                count += len(piece.token_ids)
                delta = ChoiceDelta(content=piece.text) if piece.text else ChoiceDelta()
                log_probs = ChunkLogprobs(content=list(piece.log_probs), refusal=None) if piece.log_probs else None
                if piece.text or piece.finish_reason or body.return_token_ids:
                    yield chunk(
                        [
                            ChunkChoice(
                                index=piece.index,
                                delta=delta,
                                finish_reason=piece.finish_reason,
                                logprobs=log_probs,
                                **_more(body, piece.token_ids),
                            )
                        ]
                    )
    except ApiError as error:
        yield {"data": json.dumps(error.body())}
        return
    usage = _usage(num_tokens, count, request)
    if wants_usage:
        yield chunk([], usage)
    yield {"data": "[DONE]"}


def _usage(prompt: int, completion: int, request: Request) -> CompletionUsage:
    request.state.log["tokens"] = completion
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def _choose(
    service: Service,
    model: Stage2Model,
    body: ChatRequest,
    choices: tuple[str | None, tuple[str, ...]],
    reply: _Reply,
    request: Request,
) -> Response:
    """Answer with the most likely of several texts."""
    if (
        body.stream or (body.n or 1) > 1 or body.stop or body.temperature or body.top_p is not None
        or body.return_token_ids
    ):  # fmt: skip
        raise ApiError(
            400, "a fixed choice is not generated: leave out stream, n, stop, temperature, top_p and return_token_ids",
            "response_format",
        )  # fmt: skip
    messages = await read_messages(service, model, body.messages)
    parts = messages[0]["content"] if len(messages) == 1 and messages[0]["role"] == "user" else []
    images, question = split_content([] if isinstance(parts, str) else parts)
    if len(images) != 1 or not question.strip():
        raise ApiError(
            400, "a fixed choice needs one message of the user, with one image and a question: send such a message",
            "messages",
        )  # fmt: skip
    name, texts = choices
    [ranked] = await service.engine.submit(model.choose, [(images[0][0], question, texts)])
    best = ranked[0].text
    content = json.dumps(best if name is None else {name: best}, ensure_ascii=False)
    log_probs = None
    if body.logprobs:
        log_probs = ChoiceLogprobs(content=[_describe_choice(ranked, body.top_logprobs or 0)], refusal=None)
    message = ChatCompletionMessage(role="assistant", content=content, refusal=None)
    choice = Choice(index=0, message=message, finish_reason="stop", logprobs=log_probs)
    prompt = model.num_query_tokens + count_tokens(model.pipeline, question)
    return _respond(reply, [choice], _usage(prompt, count_tokens(model.pipeline, best), request))


def _describe_choice(ranked: list[Candidate], count: int) -> ChatCompletionTokenLogprob:
    """Return the best candidate as a token with its probability among the candidates, which are its alternatives."""
    values = [
        TopLogprob(token=each.text, bytes=list(each.text.encode()), logprob=math.log(max(each.probability, 1e-300)))
        for each in ranked
    ]
    return ChatCompletionTokenLogprob(**values[0].model_dump(), top_logprobs=values[:count])
