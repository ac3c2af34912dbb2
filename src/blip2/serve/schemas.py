"""The bodies of requests. Fields that are not listed are refused, so that nothing is ignored in silence."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1, max_length=100_000)]


class Body(BaseModel):
    """Base class of the bodies of requests."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class ErrorDetail(BaseModel):
    """The error of a request."""

    message: str
    """One line: what was found, what was expected and what to do."""
    type: str
    param: str | None
    """The field of the request that is wrong."""
    code: str | None
    """A name of the error for programs."""


class ErrorResponse(BaseModel):
    """The body of every answer to a request that fails, in OpenAI's shape."""

    error: ErrorDetail


# -- texts and images ------------------------------------------------------------------------------------------------


class ImageURL(Body):
    """The URL of an image."""

    url: Annotated[str, Field(min_length=1)]
    """A data URL; or the URL of a file on a host that the server allows."""
    detail: Literal["auto", "low", "high"] | None = None
    """Without effect: every image is resized to the size that the model reads."""


class ImagePart(Body):
    """An image among the parts of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class TextPart(Body):
    """A text among the parts of a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=100_000)]


class ImageObject(Body):
    """An image in Jina's shape."""

    image: Annotated[str, Field(min_length=1)]
    """As ``url`` of :class:`ImageURL`."""


class TextObject(Body):
    """A text in Jina's shape."""

    text: Text


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
"""A part of a message."""
Item = Text | ImageObject | TextObject | Part
"""A text or an image: a string, ``{"text": ...}``, ``{"image": URL}``, or a part as in messages."""


# -- /v1/chat/completions ----------------------------------------------------------------------------------------------


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=100_000)] | list[Part]
    name: str | None = None
    """Without effect."""


class JSONSchema(Body):
    """A schema in ``response_format``."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    """``{"enum": [...]}``, or an object whose single property has an ``enum``: the texts to choose from."""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of an answer: text, or one of several fixed texts."""

    type: Literal["text", "json_schema"]
    json_schema: JSONSchema | None = None


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Without effect."""


class ChatRequest(Body):
    """The body of ``POST /v1/chat/completions``, as OpenAI defines it."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    """Messages of ``user`` and ``assistant`` by turns, after an optional one of ``system``; the last one is the user's.
    A first message with one image and no text asks for a caption."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of generated tokens: 100 by default, 30 for a caption."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0, the default here, is greedy search; any other value samples."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None
    """As in vLLM: the choices have the ids of the generated tokens as ``token_ids``."""
    response_format: ResponseFormat | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None
    """Without effect, and not kept."""


# -- /v1/embeddings ----------------------------------------------------------------------------------------------------


class EmbeddingRequest(Body):
    """The body of ``POST /v1/embeddings``, as OpenAI defines it, with images as well as texts."""

    model: str
    input: Item | Annotated[list[Item], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    multivector: bool = False
    """Whether to return, in ``vectors``, the vectors of all queries of an image; ITC is the maximum over them."""
    user: str | None = None


# -- /v1/rerank --------------------------------------------------------------------------------------------------------


class RerankRequest(Body):
    """The body of ``POST /v1/rerank``, as Jina and Cohere define it."""

    model: str
    query: Item
    documents: Annotated[list[Item], Field(min_length=1, max_length=1000)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    """Whether to repeat the texts among the documents. Images are never sent back."""


# -- /v1/search --------------------------------------------------------------------------------------------------------

Value = str | bool | int | float


class Condition(Body):
    """Conditions on the value of a column, which all have to hold."""

    eq: Value | None = None
    ne: Value | None = None
    gt: Value | None = None
    gte: Value | None = None
    lt: Value | None = None
    lte: Value | None = None


class SearchRequest(Body):
    """The body of ``POST /v1/search``."""

    query: Item
    top_k: Annotated[int, Field(ge=1, le=100)] = 10
    rerank_k: Annotated[int, Field(ge=0, le=100)] = 20
    """Number of images of the ITC shortlist that ITM re-ranks, if the query is a text."""
    filter: dict[str, Value | Annotated[list[Value], Field(max_length=1000)] | Condition] | None = None
    """For each column of the metadata, its value, a list of values, or conditions such as ``{"gte": 2020}``."""


# -- /v1/attention -----------------------------------------------------------------------------------------------------


class AttentionRequest(Body):
    """The body of ``POST /v1/attention``."""

    model: str
    image: Annotated[str, Field(min_length=1)]
    """The URL of an image, as in :class:`ImageURL`."""
    text: Text | None = None
    """A text that the queries read as well: for a stage-1 model (as in ITM), or a Q-Former that reads questions."""
